"""How the CUDA kernels are compiled: a cubin for each architecture and head_dim, beside their sources.

`python -m qaq_core.kernels.cuda.build` makes them, and so does the package's build with QAQ_CUDA=1. QAQ_NVCC names an
nvcc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
HEAD_DIMS = (64, 96, 128, 256)
SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v", "-cubin")
SECONDS = 900
"""Of one compilation."""


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of a kernel: registers of a thread, bytes of spills and of shared memory."""

    kernel: str
    registers: int
    spills: int
    shared: int


def cubin_name(architecture: str, head_dim: int) -> str:
    return f"{architecture}_d{head_dim}.cubin"


def find_nvcc() -> str | None:
    """QAQ_NVCC, or nvcc on PATH, or in the wheel nvidia-cuda-nvcc; None without."""
    named = os.environ.get("QAQ_NVCC")
    if named:
        return named
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = [str(path) for folder in ("cu13", "cuda_nvcc") if (path := wheel / folder / "bin" / "nvcc").exists()]
    return shutil.which("nvcc") or (found[0] if found else None)


def missing() -> str | None:
    """Why the kernels cannot be compiled here; None if they can."""
    return None if find_nvcc() else "there is no nvcc on PATH, in QAQ_NVCC, or in the wheel nvidia-cuda-nvcc"


def compile_kernels(nvcc: str, architecture: str, head_dim: int, folder: Path) -> list[Compiled]:
    """Makes one cubin in a folder.

    Raises:
        RuntimeError: nvcc failed; with what it said.
    """
    out = folder / cubin_name(architecture, head_dim)
    command = [nvcc, *FLAGS, f"-arch={architecture}", f"-DQAQ_DIM={head_dim}", "-o", str(out)]
    try:
        done = subprocess.run([*command, str(SOURCES / "kernels.cu")], capture_output=True, text=True, timeout=SECONDS)
    except OSError as error:
        raise RuntimeError(f"{nvcc} cannot be run: {error}") from None
    if done.returncode:
        raise RuntimeError(f"{nvcc} failed for {architecture}:\n{done.stderr.strip()}")
    return read_report(done.stderr)


def read_report(said: str) -> list[Compiled]:
    """What ptxas -v said of each kernel."""
    found = []
    for part in said.split("Compiling entry function '")[1:]:
        registers, spilled = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes spill stores", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if registers and spilled:
            size = int(shared[1]) if shared else 0
            found.append(Compiled(part.split("'")[0], int(registers[1]), int(spilled[1]), size))
    return found


def build(folder: Path = SOURCES, architectures: Sequence[str] = ARCHITECTURES) -> list[Path]:
    """Makes all cubins in a folder, as many at a time as there are processors; none where `missing` says why."""
    nvcc = find_nvcc()
    if nvcc is None or missing() is not None:
        return []
    kinds = [(architecture, dim) for architecture in architectures for dim in HEAD_DIMS]
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda kind: compile_kernels(nvcc, kind[0], kind[1], folder), kinds))
    return [folder / cubin_name(architecture, dim) for architecture, dim in kinds]


if __name__ == "__main__":
    reason = missing()
    if reason is not None:
        sys.exit(f"nothing is built: {reason}")
    for made in build(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES):
        print(made)
