"""CUDA kernels on a CPU: the sources of kernels/cuda/ compiled by g++, with threads that are fibers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import qaq_core.kernels.cuda as cuda

SOURCES = Path(cuda.__file__).parent


@cache
def library() -> Any:
    """The kernels for a CPU, compiled once in a process."""
    folder = tempfile.mkdtemp(prefix="qaq-emulated-")
    made = Path(folder) / "emulated.so"
    flags = ("-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas")
    subprocess.run(["g++", *flags, "-o", str(made), str(SOURCES / "emulated.cpp")], check=True, timeout=600)
    loaded = ctypes.CDLL(str(made))
    shutil.rmtree(folder)
    return loaded


class Emulation:
    """A launcher; see `Launcher`.

    Attributes:
        launched: names of kernels, in order.
    """

    name = "cuda (emulated)"

    def __init__(self, block: int = 128) -> None:
        self.block, self.threads = block, {128: 64, 1024: 128}[block]
        self.launched: list[str] = []

    def launch(
        self, kernel: str, head_dim: int, grid: tuple[int, int, int], threads: int, args: ctypes.Structure
    ) -> None:
        self.launched.append(kernel)
        done = library().qaq_emulate(kernel.encode(), head_dim, ctypes.byref(args), *grid, threads, self.block)
        assert done == 0, (kernel, head_dim, self.block)
