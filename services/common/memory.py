"""Memory that a process has freed and that the C library keeps for itself.

glibc gives back what is free at the end of its heaps, and what lies in between only when it is told to: after a burst
of large messages hundreds of megabytes would stay resident.
"""

from __future__ import annotations

import ctypes
import threading
import time
from functools import cache
from typing import Any

import psutil

STEP = 32 << 20
"""Bytes that a process may keep without using them, more than after the last time, before they are given back. That
takes some tens of milliseconds, in which threads that allocate may wait."""

LOOK_S = 5.0


class _Info(ctypes.Structure):
    """`struct mallinfo2`: `uordblks` of the heaps and `hblkhd` beside them are in use."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


class Heap:
    """The memory of this process.

    Args:
        libc: the C library.
    Raises:
        AttributeError: it is not glibc 2.33 or newer.
    """

    def __init__(self, libc: Any) -> None:
        self._trim, self._info = libc.malloc_trim, libc.mallinfo2
        self._info.restype = _Info
        self._process = psutil.Process()
        self._least = self._unused()

    def give_back(self) -> bool:
        """Gives free memory back if there is more of it than the last time. Returns whether it did."""
        unused = self._unused()
        self._least = min(self._least, unused)
        if unused < self._least + STEP:
            return False
        self._trim(ctypes.c_size_t(0))
        self._least = self._unused()
        return True

    def _unused(self) -> int:
        """Resident bytes that nobody has allocated; with what other libraries have from the system, as Python has."""
        info = self._info()
        return int(self._process.memory_info().rss - info.uordblks - info.hblkhd)


@cache
def watch() -> None:
    """Gives back what this process frees from now on, in a thread of its own. Elsewhere than with glibc nothing is
    done."""
    try:
        heap = Heap(ctypes.CDLL(None))
    except (AttributeError, OSError):
        return
    threading.Thread(target=_watch, args=(heap,), name="memory", daemon=True).start()


def _watch(heap: Heap) -> None:
    while True:
        time.sleep(LOOK_S)
        heap.give_back()
