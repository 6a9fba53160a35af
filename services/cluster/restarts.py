"""Where the servers of a stack are, and why they were started again, as far as it can be known: written by each server.

A server's process writes down every few seconds that it lives, and how many processes the kernel has killed for want
of memory. Its successor compares.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path

from pydantic import BaseModel

from services.cluster.remains import MARK

BEAT_S = 5.0
MONITOR = "RAY_memory_monitor_refresh_ms"
_FOLDER = "servers"
_VMSTAT = Path("/proc/vmstat")


class Record(BaseModel):
    """A server's present process, and the end of the one before it.

    Attributes:
        seen: when the process lived last, in seconds since the epoch.
        memory_kills: the kernel's count of processes that it killed for want of memory, at that time.
        address: host:port, once it serves.
        restarts: how often the server was started again. ended, why: when and why it was for the last time.
    """

    pid: int
    seen: float
    memory_kills: int
    address: str = ""
    restarts: int = 0
    ended: float | None = None
    why: str = ""


class Life:
    """The record of one server.

    Args:
        directory: of the stack.
        name: of the server, such as worker-0.
        pid: of its process; None is this one.
    """

    def __init__(self, directory: Path, name: str, pid: int | None = None) -> None:
        self._path = directory / _FOLDER / f"{name}.json"
        self.record = Record(pid=pid or os.getpid(), seen=time.time(), memory_kills=memory_kills())

    @classmethod
    def of_this_actor(cls, name: str) -> Life | None:
        """None outside of a stack that has a directory."""
        directory = os.environ.get(MARK)
        return cls(Path(directory), name) if directory else None

    def begin(self, *, restarted: bool) -> str:
        """Writes the record of a process that starts. Returns why it was started again, or nothing."""
        before = _read(self._path)
        if restarted and before is not None:
            why = _why(before, self.record)
            self.record = self.record.model_copy(
                update={"restarts": before.restarts + 1, "ended": before.seen, "why": why}
            )
        self._write()
        return self.record.why

    def serves(self, address: str) -> None:
        """Says where it serves, for those who ask while it hangs."""
        self.record = self.record.model_copy(update={"address": address})
        self._write()

    async def beat(self) -> None:
        """Says every few seconds that this process lives."""
        while True:
            await asyncio.sleep(BEAT_S)
            self.say_alive()

    def say_alive(self) -> None:
        """Says that the process lives."""
        self.record = self.record.model_copy(update={"seen": time.time(), "memory_kills": memory_kills()})
        self._write()

    def end(self) -> str:
        """Why the process has ended, after it lived when this object last said so."""
        return _why(self.record, Record(pid=0, seen=time.time(), memory_kills=memory_kills()))

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # without room for it, a restart has no reason
            self._path.parent.mkdir(exist_ok=True)
            new = self._path.with_suffix(".new")
            new.write_text(self.record.model_dump_json())
            os.replace(new, self._path)


def records(directory: Path) -> dict[str, Record]:
    """The servers of a stack, and some that it had, by name."""
    found = {path.stem: _read(path) for path in sorted((directory / _FOLDER).glob("*.json"))}
    return {name: record for name, record in found.items() if record is not None}


def restarted(directory: Path) -> dict[str, Record]:
    """Servers of a stack that were started again, by name."""
    return {name: record for name, record in records(directory).items() if record.restarts}


def memory_kills() -> int:
    """How many processes the kernel of this machine has killed for want of memory; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in _VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _why(before: Record, now: Record) -> str:
    kills = now.memory_kills - before.memory_kills
    if kills > 0:
        killed = "a process" if kills == 1 else f"{kills} processes"
        return f"memory was short: the kernel killed {killed} at that time, probably this one among them"
    monitor = (
        "" if os.environ.get(MONITOR, "0") == "0" else f", perhaps by Ray's memory monitor, which {MONITOR} turns on"
    )
    return f"its process (pid {before.pid}) was killed or crashed{monitor}"


def _read(path: Path) -> Record | None:
    try:
        return Record.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None
