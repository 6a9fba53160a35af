"""Writes a turn's tokens to its session's log, behind the stream's back.

The log is for the next turn, which begins when this one has ended and `flush` has returned; a stream that
moves to another worker goes on from what its router holds. So tokens may wait for each other: one write for many.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from redis.exceptions import RedisError

from services.router.sessions import SessionDirectory

LAG_S = 0.25
"""How long a token waits for later ones. So much is missing in the log of a session whose router is killed."""


class LogWriter:
    """Appends in order, one write at a time; what a failed write held is in the next one.

    Args:
        offset: the log's length before the turn. prompt: the turn's first tokens, written with the first
            generated one and at once, so that a turn that never began can be sent again.
        lost: called when the session turns out to be closed.
    """

    def __init__(
        self,
        sessions: SessionDirectory,
        session: str,
        offset: int,
        prompt: Sequence[int],
        lost: Callable[[], None],
    ) -> None:
        self._sessions = sessions
        self._session = session
        self._offset = offset
        self._pending = list(prompt)
        self._lost = lost
        self._ending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def began(self) -> bool:
        return self._task is not None

    def add(self, token: int) -> None:
        """Notes a token. It is written within `LAG_S`, if Redis takes it."""
        self._pending.append(token)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write_behind(), name=f"log {self._session}")

    async def flush(self) -> None:
        """Returns when Redis has every token.

        Raises:
            redis.exceptions.RedisError: it does not take them.
        """
        self._ending.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._ending.clear()  # other choices may go on
        while self._pending:
            await self._write()

    async def _write_behind(self) -> None:
        """Writes and waits in turns, until nothing came while it waited."""
        with contextlib.suppress(RedisError):  # the tokens are still pending: the next write has them
            while self._pending:
                await self._write()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), LAG_S)

    async def _write(self) -> None:
        batch = tuple(self._pending)
        if await self._sessions.write(self._session, self._offset, batch):
            self._offset += len(batch)
            del self._pending[: len(batch)]
        else:
            self._pending.clear()  # nobody will read them
            self._lost()
