"""The C++ library: kernels for the CPU behind a plain C interface (csrc/), called through ctypes.

Calls release the interpreter lock. The library is built when the package is installed; without a C++
compiler the install succeeds and torch operations run instead.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from qaq_core.errors import ConfigError

KERNELS = ("auto", "cpu", "triton", "reference")
INTERFACE = 15
"""QAQ_INTERFACE of csrc/attention.h; a library that was built from another is not used."""


@cache
def library() -> Any | None:
    """The C++ library that was built with the package, or the one that QAQ_LIBRARY names; None without."""
    loaded, _ = _load()
    return loaded


def missing() -> str | None:
    """Why there is no library, with what to do about it; None if there is one."""
    return _load()[1]


@cache
def _load() -> tuple[Any | None, str | None]:
    folder = Path(__file__).parent
    given = os.environ.get("QAQ_LIBRARY")
    for path in [Path(given)] if given else [folder / f"_cpu{suffix}" for suffix in EXTENSION_SUFFIXES]:
        if path.exists():
            loaded = ctypes.CDLL(str(path))
            loaded.qaq_isa.restype = ctypes.c_char_p
            loaded.qaq_use.argtypes = [ctypes.c_char_p]
            if loaded.qaq_interface() == INTERFACE:
                return loaded, None
            return None, f"{path} was built from other sources: reinstall QAQ"
    if given:
        return None, f"QAQ_LIBRARY={given} is not there: unset it"
    return None, "the C++ library is not built: install a C++ compiler and reinstall QAQ"


def chosen(kernel: str | None) -> str:
    """One of KERNELS: the one named, else the environment's QAQ_KERNEL, else "auto".

    Raises:
        ConfigError: there is none of that name.
    """
    kernel = kernel or os.environ.get("QAQ_KERNEL", "auto")
    if kernel not in KERNELS:
        raise ConfigError(f"QAQ_KERNEL must be one of {', '.join(KERNELS)}, not {kernel!r}")
    return kernel


def find(device: torch.device, kernel: str | None = None) -> Any | None:
    """The library if it is to be used on a device, else None, and torch operations run.

    Args:
        kernel: one of KERNELS; the environment's QAQ_KERNEL if not given. "auto" takes the fastest there is.
    Raises:
        ConfigError: the kernel is unknown, or cannot run here.
    """
    kernel = chosen(kernel)
    if kernel == "cpu" and device.type != "cpu":
        raise ConfigError(f"QAQ_KERNEL=cpu cannot run on {device.type}: set QAQ_KERNEL=auto")
    if kernel == "cpu" and library() is None:
        raise ConfigError(f"QAQ_KERNEL=cpu, but {missing()}")
    return library() if kernel != "reference" and device.type == "cpu" else None
