"""Memory that a process has freed and that the C library keeps for itself.

glibc gives back what is free at the end of its heaps, and what lies in between only when it is told to: after a burst
of large messages hundreds of megabytes would stay resident.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from functools import cache

import psutil

STEP = 32 << 20
"""Resident bytes that a process grows by before its free memory is given back. That takes some tens of milliseconds,
in which threads that allocate may wait."""

LOOK_S = 2.0


class Heap:
    """The memory of this process.

    Args:
        trim: gives all free memory back to the system.
    """

    def __init__(self, trim: Callable[[], object]) -> None:
        self._trim, self._process = trim, psutil.Process()
        self._least = self._resident()

    def keep_small(self) -> bool:
        """Gives free memory back if the process has grown since the last time. Returns whether it did."""
        resident = self._resident()
        self._least = min(self._least, resident)
        if resident < self._least + STEP:
            return False
        self._trim()
        self._least = self._resident()
        return True

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)


@cache
def watch() -> None:
    """Keeps this process small from now on, in a thread of its own. Does nothing where the C library is not glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return
    heap = Heap(lambda: trim(ctypes.c_size_t(0)))
    threading.Thread(target=_watch, args=(heap,), name="memory", daemon=True).start()


def _watch(heap: Heap) -> None:
    while True:
        time.sleep(LOOK_S)
        heap.keep_small()
