"""Kernels for NVIDIA GPUs in CUDA C++: sources, how they are built, counted and loaded. See docs/gpu.md."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaq_core.kernels.cuda.build import ARCHITECTURES, HEAD_DIMS, Compiled, compile_kernels, cubin_name, find_nvcc
    from qaq_core.kernels.cuda.counts import BLOCK, Counts, Profile, UnknownCode, count, find_disassembler, profile
    from qaq_core.kernels.cuda.driver import architecture_for
    from qaq_core.kernels.cuda.encode import cuda_encoders
    from qaq_core.kernels.cuda.launcher import Launcher
    from qaq_core.kernels.cuda.weave import CudaWeaver

__all__ = [
    "ARCHITECTURES",
    "BLOCK",
    "HEAD_DIMS",
    "Compiled",
    "Counts",
    "CudaWeaver",
    "Launcher",
    "Profile",
    "UnknownCode",
    "architecture_for",
    "compile_kernels",
    "count",
    "cubin_name",
    "cuda_encoders",
    "find_disassembler",
    "find_nvcc",
    "profile",
]

_HOMES = {
    "build": ("ARCHITECTURES", "HEAD_DIMS", "Compiled", "compile_kernels", "cubin_name", "find_nvcc"),
    "counts": ("BLOCK", "Counts", "Profile", "UnknownCode", "count", "find_disassembler", "profile"),
    "driver": ("architecture_for",),
    "launcher": ("Launcher",),
    "encode": ("cuda_encoders",),
    "weave": ("CudaWeaver",),
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used, so that `python -m qaq_core.kernels.cuda.build` runs its module once."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
