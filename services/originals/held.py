"""Held pages: those that running sequences of this process need. The store neither drops nor expires them."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any

import structlog
from qaq.v1 import originals_pb2 as pb

from qaq_core.base.errors import OriginalsError
from services.common.log import once
from services.originals.replicas import Replicas, Stub

TOUCH_EVERY_S = 60.0
TOUCH_TIMEOUT_S = 5.0
TELL_AFTER_S = 0.1
"""How long a change waits for others, to be told with them."""
_IDS_PER_CALL = 4096

log = structlog.get_logger()


class HeldPages:
    """Counts the holders of each page, and tells the store. Belongs to one event loop.

    Attributes:
        holder: the name of this process in the store.
    """

    def __init__(self, replicas: Replicas) -> None:
        self.holder = secrets.token_hex(6)
        self._replicas = replicas
        self._holders: Counter[bytes] = Counter()
        self._news: dict[bytes, None] = {}  # ids in order, of which the store may not know whether they are held
        self._changed = asyncio.Event()

    def hold(self, page_ids: Iterable[bytes], *, told: bool = False) -> None:
        """Counts one holder more of each page.

        Args:
            told: the call that the pages came with, or go with, names their holder.
        """
        page_ids = list(page_ids)
        if not told:
            self._tell([page_id for page_id in page_ids if page_id not in self._holders])
        for page_id in page_ids:
            self._holders[page_id] += 1

    def forget(self, page_ids: Iterable[bytes]) -> None:
        """Counts one holder less of each page."""
        for page_id in page_ids:
            self._holders[page_id] -= 1
            if self._holders[page_id] <= 0:
                del self._holders[page_id]
                self._tell([page_id])

    def arrived(self, page_id: bytes) -> None:
        """The store has a page, whose holders may have gone meanwhile."""
        if page_id not in self._holders:
            self._tell([page_id])

    async def keep_touching(self) -> None:
        """Touches the held pages every `TOUCH_EVERY_S` until cancelled."""
        while True:
            await asyncio.sleep(TOUCH_EVERY_S)
            await self._touch(list(self._holders))

    async def keep_telling(self) -> None:
        """Tells the store which pages came to be held and which are not held any more, until cancelled."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(TELL_AFTER_S)
            self._changed.clear()
            news, self._news = list(self._news), {}
            await self._touch([page_id for page_id in news if page_id in self._holders])
            released = [page_id for page_id in news if page_id not in self._holders]
            await self._release(released)
            await self._touch([page_id for page_id in released if page_id in self._holders])  # held again meanwhile

    def _tell(self, page_ids: Sequence[bytes]) -> None:
        self._news.update(dict.fromkeys(page_ids))
        if page_ids:
            self._changed.set()

    async def _touch(self, page_ids: Sequence[bytes]) -> None:
        for part in _parts(page_ids):
            request = pb.TouchRequest(page_ids=part, holder=self.holder)
            await self._send(part[0], partial(_touch, request))

    async def _release(self, page_ids: Sequence[bytes]) -> None:
        for part in _parts(page_ids):
            request = pb.ReleaseRequest(page_ids=part, holder=self.holder)
            await self._send(part[0], partial(_release, request))

    async def _send(self, page_id: bytes, call: Callable[[Stub], Awaitable[Any]]) -> None:
        try:
            await self._replicas.call(page_id, call)
        except OriginalsError as error:
            # Held pages are touched again within a minute, and other holds run out by themselves.
            if once("touch"):
                log.warning("cannot tell the store which pages are held; trying again later", error=str(error))


def _parts(page_ids: Sequence[bytes]) -> list[Sequence[bytes]]:
    """Ids of one call each, the last ones first: they are the first to be free."""
    return [page_ids[start : start + _IDS_PER_CALL] for start in range(0, len(page_ids), _IDS_PER_CALL)][::-1]


def _touch(request: pb.TouchRequest, stub: Stub) -> Awaitable[Any]:
    return stub.Touch(request, timeout=TOUCH_TIMEOUT_S)


def _release(request: pb.ReleaseRequest, stub: Stub) -> Awaitable[Any]:
    return stub.Release(request, timeout=TOUCH_TIMEOUT_S)
