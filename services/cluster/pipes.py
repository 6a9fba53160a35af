"""Lines of JSON between the command, the guard and the host of a stack."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator


def lines(descriptor: int) -> Iterator[str]:
    """Lines as they arrive, until the other side closes. A thread may wait here while its process ends."""
    rest = b""
    while block := os.read(descriptor, 1 << 16):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield line.decode()


class Events:
    """What a process tells the one that started it, on its standard output; other output goes to standard error."""

    def __init__(self) -> None:
        self.descriptor = os.dup(1)
        os.dup2(2, 1)

    def send(self, **event: object) -> None:
        """Sends one event. Does nothing if nobody listens any more."""
        left = (json.dumps(event) + "\n").encode()
        with contextlib.suppress(BrokenPipeError):
            while left:
                left = left[os.write(self.descriptor, left) :]

    def close(self) -> None:
        os.close(self.descriptor)
