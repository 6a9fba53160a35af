"""Replies: messages of the scheduler's thread to the callers, who wait in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from services.worker.call import Call, Reply
from services.worker.generation import Generation

Message = tuple[Call, Reply | Exception]


class Replies:
    """Collects messages and delivers them in one call. Used by the scheduler's thread alone.

    Args:
        loop: the event loop that reads the generations' replies.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._messages: list[Message] = []

    def put(self, generation: Generation, reply: Reply | Exception) -> None:
        self.tell(generation.call, reply)

    def extend(self, generation: Generation, replies: Iterable[Reply]) -> None:
        self._messages += [(generation.call, reply) for reply in replies]

    def tell(self, call: Call, reply: Reply | Exception) -> None:
        """As `put`, for a call that may have no generation any more."""
        self._messages.append((call, reply))

    def send(self) -> None:
        """Hands the collected messages to the event loop."""
        if self._messages:
            messages, self._messages = self._messages, []
            self._loop.call_soon_threadsafe(_deliver, messages)


def _deliver(messages: Sequence[Message]) -> None:
    for call, reply in messages:
        call.replies.put_nowait(reply)
