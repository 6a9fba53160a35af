"""The CUDA kernels on a CPU: the same sources compiled by g++, with threads that are fibers. For tests, and slow.

QAQ_EMULATE=1 lets QAQ_KERNEL=cuda choose it on a CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from qaq_core.base.errors import KernelError
from qaq_core.base.paths import cache_dir

SOURCES = Path(__file__).parent
FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas")
_THREADS = {128: 64, 1024: 128}


def missing() -> str | None:
    """Why a CPU does not emulate the kernels, with what to do about it; None if it does."""
    if os.environ.get("QAQ_EMULATE") != "1":
        return "on a CPU the CUDA kernels are emulated only, for tests; set QAQ_EMULATE=1"
    return None if shutil.which("g++") else "there is no g++ that would compile the CUDA kernels for a CPU"


@cache
def library() -> Any:
    """The kernels for a CPU, compiled where these sources have not been yet.

    Raises:
        KernelError: g++ is not there, or fails.
    """
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp"))
    content = b"\0".join([repr(FLAGS).encode(), *(path.read_bytes() for path in sources)])
    made = cache_dir() / f"emulated-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}")
        command = ["g++", *FLAGS, "-o", str(part), str(SOURCES / "emulated.cpp")]
        try:
            subprocess.run(command, check=True, timeout=600, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            raise KernelError(f"the CUDA kernels cannot be compiled for a CPU: {said}") from None
        part.replace(made)
    return ctypes.CDLL(str(made))


class Emulation:
    """A launcher; see `Launcher`.

    Args:
        block: packed tokens of a block, 128 or, at head_dim 64, as many as on a GPU.

    Attributes:
        launched: names of kernels, in order.
    """

    name = "cuda (emulated)"

    def __init__(self, block: int = 128) -> None:
        self.block, self.threads = block, _THREADS[block]
        self.launched: list[str] = []

    def launch(
        self, kernel: str, head_dim: int, grid: tuple[int, int, int], threads: int, args: ctypes.Structure
    ) -> None:
        """Runs a kernel.

        Raises:
            KernelError: there is none of that name, head_dim and block.
        """
        self.launched.append(kernel)
        if library().qaq_emulate(kernel.encode(), head_dim, ctypes.byref(args), *grid, threads, self.block):
            raise KernelError(f"no kernel {kernel} of head_dim {head_dim} for blocks of {self.block} is emulated")
