"""Kernels for NVIDIA GPUs in CUDA C++: sources, how they are built, counted and loaded. See docs/gpu.md."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaq_core.kernels.cuda.build import ARCHITECTURES, HEAD_DIMS, Compiled, compile_kernels, cubin_name, find_nvcc
    from qaq_core.kernels.cuda.counts import BLOCK, Counts, Profile, UnknownCode, count, find_disassembler, profile

__all__ = [
    "ARCHITECTURES",
    "BLOCK",
    "HEAD_DIMS",
    "Compiled",
    "Counts",
    "Profile",
    "UnknownCode",
    "compile_kernels",
    "count",
    "cubin_name",
    "find_disassembler",
    "find_nvcc",
    "profile",
]

_BUILD = ("ARCHITECTURES", "HEAD_DIMS", "Compiled", "compile_kernels", "cubin_name", "find_nvcc")


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used, so that `python -m qaq_core.kernels.cuda.build` runs its module once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "build" if name in _BUILD else "counts"
    return getattr(import_module(f"{__name__}.{home}"), name)
