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

from qaq_core.base.errors import KernelError
from qaq_core.kernels.structures import INTERFACE, compiled, declared, difference

_REFUSALS = {
    -2: "a pointer that it needs is null",
    -3: "sizes do not fit each other",
    -4: "a type, a width, an index or a position is out of range",
}
"""QaqRefusal of csrc/interface.h."""


def checked(function: Any, *arguments: Any) -> int:
    """Calls a function of the library. Returns what it returns.

    Raises:
        KernelError: it refused its arguments. MemoryError: it has no memory for scratch.
    """
    result: int = function(*arguments)
    if result == -1:
        raise MemoryError("no memory for a kernel's scratch")
    if result < 0:
        raise KernelError(f"{function.__name__} cannot be called like this: {_REFUSALS.get(result, result)}")
    return result


@cache
def load_library() -> Any | None:
    """The C++ library that was built with the package, or the one that QAQ_LIBRARY names; None without."""
    loaded, _ = _load()
    return loaded


def missing_library() -> str | None:
    """Why there is no library, with what to do about it; None if there is one."""
    return _load()[1]


@cache
def _load() -> tuple[Any | None, str | None]:
    folder = Path(__file__).parent
    given = os.environ.get("QAQ_LIBRARY")
    for path in [Path(given)] if given else [folder / f"_cpu{suffix}" for suffix in EXTENSION_SUFFIXES]:
        if path.exists():
            loaded = ctypes.CDLL(str(path))
            if (wrong := _mismatch(loaded)) is not None:
                return None, f"{path} was built from other sources ({wrong}): reinstall QAQ"
            loaded.qaq_isa.restype = ctypes.c_char_p
            loaded.qaq_use.argtypes = [ctypes.c_char_p]
            return loaded, None
    if given:
        return None, f"QAQ_LIBRARY={given} is not there: unset it"
    return None, "the C++ library is not built: install a C++ compiler and reinstall QAQ"


def _mismatch(library: Any) -> str | None:
    """How a library differs from what Python declares; None if it fits."""
    built = library.qaq_interface()
    if built != INTERFACE:
        return f"interface {built} instead of {INTERFACE}"
    return difference(declared(), compiled(library))
