"""Writes a turn's tokens to its session's log, behind the stream's back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from services.router.sessions import SessionDirectory


class LogWriter:
    """Appends in order, one write at a time; what a failed write held is in the next one.

    Args:
        offset: the log's length before the turn. prompt: the turn's first tokens, written with the first
            generated one, so that a turn that never began can be sent again.
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
        self._task: asyncio.Task[None] | None = None

    @property
    def began(self) -> bool:
        return self._task is not None

    def add(self, token: int) -> None:
        """Notes a token. It is written as soon as the write before it is done."""
        self._pending.append(token)
        if self._task is None or self._settled():
            self._task = asyncio.create_task(self._drain(), name=f"log {self._session}")

    async def flush(self) -> None:
        """Returns when Redis has every token.

        Raises:
            redis.exceptions.RedisError: it does not take them.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
            self._settled()
        await self._drain()

    def _settled(self) -> bool:
        """Whether the last write has ended; its error is dropped, its tokens are still pending."""
        assert self._task is not None
        if not self._task.done():
            return False
        if not self._task.cancelled():
            self._task.exception()
        return True

    async def _drain(self) -> None:
        while self._pending:
            batch = tuple(self._pending)
            if not await self._sessions.write(self._session, self._offset, batch):
                self._lost()
                return
            self._offset += len(batch)
            del self._pending[: len(batch)]
