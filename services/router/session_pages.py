"""Where a session's originals are: the names of its stored pages, beside its token log in Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from redis.exceptions import RedisError

from services.router.sessions import SessionDirectory


class SessionPages:
    """The list of one session while a turn of it runs. Written behind the stream's back, one write at a time."""

    def __init__(self, sessions: SessionDirectory, session: str) -> None:
        self._sessions, self._session = sessions, session
        self.names: list[bytes] = []
        self._written: list[bytes] = []
        self._task: asyncio.Task[None] | None = None

    async def load(self) -> list[bytes]:
        """What earlier turns wrote."""
        self.names = await self._sessions.pages(self._session)
        self._written = list(self.names)
        return self.names

    def put(self, first: int, names: Sequence[bytes]) -> None:
        """From place `first` on the list is `names`, and nothing after them."""
        self.names[first:] = names
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain(), name=f"pages {self._session}")

    async def flush(self) -> None:
        """Returns when Redis has the list.

        Raises:
            redis.exceptions.RedisError: it does not take it.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
            await self._write()

    async def _drain(self) -> None:
        with contextlib.suppress(RedisError):  # the next write has it all
            await self._write()

    async def _write(self) -> None:
        while self.names != self._written:
            names = list(self.names)
            await self._sessions.write_pages(self._session, names)
            self._written = names
