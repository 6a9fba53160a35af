"""Writes a turn's tokens to the session's token log, in the background.

The log is read by the next turn, which begins after `flush` has returned. A stream that moves to another worker resumes
from the tokens in its router's memory. So tokens can be collected: one write for many tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from redis.exceptions import RedisError

from services.router.hold import Hold

LAG_S = 0.25
"""How long a token waits for later tokens. The tokens of this time are lost from the log when a router is killed."""


class LogWriter:
    """Appends in order, one write at a time. The tokens of a failed write are in the next one.

    Args:
        offset: length of the log before the turn.
        prompt: the first tokens of the turn. They are written at once with the first generated token, not earlier, so
            that a turn that produced nothing can be sent again.
        lost: called when the session turns out to be lost.
    """

    def __init__(self, hold: Hold, offset: int, prompt: Sequence[int], lost: Callable[[], None]) -> None:
        self._hold = hold
        self._offset = offset
        self._pending = list(prompt)
        self._lost = lost
        self._ending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def began(self) -> bool:
        return self._task is not None

    def add(self, token: int) -> None:
        """Adds a token. It is written within `LAG_S`, if Redis answers."""
        self._pending.append(token)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write_behind(), name=f"log {self._hold.session}")

    async def flush(self, patience_s: float = 0.0) -> None:
        """Returns when Redis has every token.

        Args:
            patience_s: how long to try a failed write again.
        Raises:
            redis.exceptions.RedisError: the write failed.
        """
        ends = time.monotonic() + patience_s
        self._ending.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._ending.clear()  # other choices may still generate
        while self._pending:
            try:
                await self._write()
            except RedisError:
                if time.monotonic() >= ends:
                    raise
                await asyncio.sleep(LAG_S)

    async def _write_behind(self) -> None:
        """Writes and waits `LAG_S`, until no token arrived while it waited."""
        with contextlib.suppress(RedisError):  # the tokens are still pending, for the next write
            while self._pending:
                await self._write()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), LAG_S)

    async def _write(self) -> None:
        batch = tuple(self._pending)
        if await self._hold.write(self._offset, batch):
            self._offset += len(batch)
            del self._pending[: len(batch)]
        else:
            self._pending.clear()  # no turn will read them
            self._lost()
