"""Writes to Redis within the budget of pages: what is dropped for them, and when they are refused."""

from __future__ import annotations

import asyncio

import structlog
from redis.exceptions import ResponseError

from services.common import metrics
from services.common.errors import InvalidArgument, ResourceExhausted
from services.common.log import once
from services.common.redis import is_full
from services.originals.budget import Budget
from services.originals.index import PageIndex

RETRY_AFTER_MS = 2000
_IN_FLIGHT = 4
"""Pages on their way to Redis, which needs memory for each beside the budget."""
_SLACK = 4 << 20
"""Dropped beside a page's own bytes when others have filled Redis, for what a write needs meanwhile."""

log = structlog.get_logger()


class Writer:
    """Stores values and drops others for them, the least recently used first.

    Attributes:
        evicted, refused: values that this object dropped for others, and that it could not store.
    """

    def __init__(self, index: PageIndex, budget: Budget) -> None:
        self._index, self._budget = index, budget
        self._writing = asyncio.Semaphore(_IN_FLIGHT)
        self.evicted = self.refused = 0

    async def put(self, key: str, value: bytes | memoryview, holder: str, replace: bool = False) -> bool:
        """Sets a key; whether it was new. Makes room as long as there is something to drop.

        Raises:
            ResourceExhausted: all others are held. InvalidArgument: it is larger than the whole budget.
        """
        async with self._writing:
            while True:
                try:
                    put = await self._index.put(key, value, holder, self._budget.nbytes, replace=replace)
                except ResponseError as error:
                    if not is_full(error):
                        raise
                    if await self._evict(len(value)):
                        continue
                    raise self._refused("Redis is full, and not with pages that could be dropped") from error
                self._count_evicted(put.dropped)
                if put.answer == "full":
                    self._check_size(put.nbytes)
                    budget = self._budget.nbytes
                    raise self._refused(f"running sessions hold all pages in the {budget:,} bytes that pages may take")
                if put.answer != "more":
                    return put.answer == "stored"

    async def _evict(self, nbytes: int) -> int:
        """Drops so many bytes that nobody holds, for a Redis that others have filled."""
        stored = await self._index.nbytes()
        dropped = await self._index.evict(max(0, stored - nbytes - _SLACK))
        self._count_evicted(dropped)
        return dropped

    def _count_evicted(self, dropped: int) -> None:
        self.evicted += dropped
        metrics.pages_evicted.inc(dropped)

    def _check_size(self, nbytes: int) -> None:
        whole = self._budget.whole
        if whole is not None and nbytes > whole:
            raise InvalidArgument(
                f"it takes {nbytes:,} bytes and all pages together may take {whole:,}; use fewer page_tokens, or raise "
                "Redis' maxmemory or QAQ_PAGE_BUDGET_BYTES"
            )

    def _refused(self, reason: str) -> ResourceExhausted:
        self.refused += 1
        metrics.pages_refused.inc()
        message = (
            f"{reason}; it is tried again until there is room: run fewer sessions, or raise Redis' maxmemory or "
            "QAQ_PAGE_BUDGET_BYTES"
        )
        if once("pages refused"):
            log.warning(message)
        return ResourceExhausted(message, retry_after_ms=RETRY_AFTER_MS, reason="pages-full")
