"""The logs of a stack's servers: files that outlive them and the stack, with a bounded size."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from pathlib import Path

from services.cluster import state

MAX_BYTES = 4 << 20  # of a file; each has one predecessor
LOOK_S = 5.0
_FOLDER = "logs"


class Log:
    """The file to which this process writes what it prints, C++ and the interpreter's last words too.

    Args:
        name: of the server, such as worker-0.
        again: the server was started again: what it printed before stays in front.
    """

    def __init__(self, folder: Path, name: str, *, again: bool, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._max = folder / f"{name}.log", max_bytes
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not again:
            self._put_away()

    def take(self) -> None:
        """Standard output and standard error go to the file from now on."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.close(descriptor)

    def turn(self) -> None:
        """Begins a new file if this one is long."""
        if self._path.exists() and self._path.stat().st_size <= self._max:
            return
        self._put_away()
        self.take()

    async def keep(self) -> None:
        """Looks every few seconds how long it is."""
        while True:
            await asyncio.sleep(LOOK_S)
            with contextlib.suppress(OSError):  # without room the old one goes on
                self.turn()

    def _put_away(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._path, self._path.with_suffix(".log.1"))


def folder() -> Path:
    """Where the logs of the stack that `qaq up` starts are."""
    return state.directory() / _FOLDER


def found() -> dict[str, list[Path]]:
    """The files of each server of the last stack, the oldest first; `stack` is what its own processes say."""
    files: dict[str, list[Path]] = {}
    for path in [*sorted(folder().glob("*.log.1")), *sorted(folder().glob("*.log")), state.directory() / "stack.log"]:
        if path.is_file():
            files.setdefault(path.name.partition(".log")[0], []).append(path)
    return dict(sorted(files.items()))


def tail(paths: list[Path], lines: int) -> list[str]:
    """The last lines of files that follow each other."""
    kept: deque[str] = deque(maxlen=lines)
    for path in paths:
        with path.open(errors="replace") as file:
            kept.extend(line.rstrip("\n") for line in file)
    return list(kept)
