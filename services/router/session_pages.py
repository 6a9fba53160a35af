"""The ids of a session's stored pages, which are kept beside its token log in Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from qaq.v1 import worker_pb2
from redis.exceptions import RedisError

from services.router.hold import Hold


class SessionPages:
    """The page ids of one session during a turn. They are written in the background, one write at a time.

    Args:
        ids: those that earlier turns wrote.
    """

    def __init__(self, hold: Hold, ids: Sequence[bytes]) -> None:
        self._hold = hold
        self.ids = list(ids)
        self._written = list(ids)
        self._page_tokens = 0
        self._task: asyncio.Task[None] | None = None

    def put(self, pages: worker_pb2.RunReply.Pages) -> None:
        """Replaces all ids from the first of the pages on."""
        self.ids[pages.first :] = pages.ids
        self._page_tokens = pages.page_tokens
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain(), name=f"pages {self._hold.session}")

    async def flush(self) -> None:
        """Returns when Redis has the ids.

        Raises:
            redis.exceptions.RedisError: the write failed.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
            await self._write()

    async def _drain(self) -> None:
        with contextlib.suppress(RedisError):  # the next write has all ids
            await self._write()

    async def _write(self) -> None:
        while self.ids != self._written:
            ids = list(self.ids)
            await self._hold.write_pages(ids, self._page_tokens)
            self._written = ids
