"""Memory that was freed: a process of its own each, so that nothing else of the tests is counted."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Frees 160 MB in pieces that lie between others, which stay.
PROGRAM = """
import os, sys, time
from services.common import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

memory.LOOK_S = 0.05
if sys.argv[1] == "watched":
    memory.watch()
    memory.watch()
before = resident()
pieces = [b"x" * (100_000 if i % 2 else 2_000) for i in range(3200)]
full = resident()
time.sleep(0.3)  # it is looked at before it is free, too
del pieces[1::2]
ends = time.monotonic() + (20 if sys.argv[1] == "watched" else 0.5)
while resident() - before > 50 and time.monotonic() < ends:
    time.sleep(0.05)
print(full - before, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("watched", [True, False])
def test_what_was_freed_is_given_back(watched: bool) -> None:
    """Without the watch it stays: this would notice if the C library gave it back by itself."""
    how = "watched" if watched else "alone"
    told = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60, check=True)
    full, left = map(int, told.stdout.split())
    assert full > 150
    assert (left < 50) == watched, told.stdout
