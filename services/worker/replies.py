"""The outbox: what the engine's thread has to say to those who listen in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from services.worker.generation import Generation, Reply

Message = tuple[Generation, Reply | Exception]


class Replies:
    """Collects messages and hands them over together. Belongs to the engine's thread.

    Args:
        loop: the event loop that reads the generations' replies.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._messages: list[Message] = []

    def put(self, generation: Generation, reply: Reply | Exception) -> None:
        self._messages.append((generation, reply))

    def put_all(self, generation: Generation, replies: Iterable[Reply]) -> None:
        self._messages += [(generation, reply) for reply in replies]

    def send(self) -> None:
        if self._messages:
            batch, self._messages = self._messages, []
            self._loop.call_soon_threadsafe(_deliver, batch)


def _deliver(batch: Sequence[Message]) -> None:
    for generation, reply in batch:
        generation.replies.put_nowait(reply)
