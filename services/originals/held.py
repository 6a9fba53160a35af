"""Held pages: those that sequences of this process need. Their expiry in Redis is postponed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

import structlog
from qaq.v1 import originals_pb2 as pb

from qaq_core.base.errors import OriginalsError
from services.common.log import once
from services.originals.replicas import Replicas

TOUCH_EVERY_S = 60.0
TOUCH_TIMEOUT_S = 5.0
_IDS_PER_TOUCH = 4096

log = structlog.get_logger()


class HeldPages:
    """Counts the holders of each page. Belongs to one event loop."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._holders: Counter[bytes] = Counter()

    def hold(self, page_ids: Iterable[bytes]) -> None:
        for page_id in page_ids:
            self._holders[page_id] += 1

    def forget(self, page_ids: Iterable[bytes]) -> None:
        for page_id in page_ids:
            self._holders[page_id] -= 1
            if self._holders[page_id] <= 0:
                del self._holders[page_id]

    async def keep_touching(self) -> None:
        """Touches the held pages every `TOUCH_EVERY_S` until cancelled."""
        while True:
            await asyncio.sleep(TOUCH_EVERY_S)
            held = list(self._holders)
            for start in range(0, len(held), _IDS_PER_TOUCH):
                await self._touch(held[start : start + _IDS_PER_TOUCH])

    async def _touch(self, page_ids: list[bytes]) -> None:
        request = pb.TouchRequest(page_ids=page_ids)
        try:
            await self._replicas.call(page_ids[0], lambda stub: stub.Touch(request, timeout=TOUCH_TIMEOUT_S))
        except OriginalsError as error:
            if once("touch"):
                log.warning("cannot postpone the expiry of pages; trying again later", error=str(error))
