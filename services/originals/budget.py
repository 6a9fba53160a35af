"""The budget of what the cache services store in Redis: sessions and heartbeats always have room beside it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common import metrics
from services.common.log import once
from services.originals.index import PageIndex

FOLLOW_EVERY_S = 2.0
_LEAST_RESERVE = 16 << 20

log = structlog.get_logger()


def reserve(maxmemory: int) -> int:
    """Bytes of Redis' memory that are not for pages: an eighth, at least 16 MiB, at most half."""
    return min(maxmemory // 2, max(_LEAST_RESERVE, maxmemory // 8))


class Budget:
    """Bytes that pages and codecs may take in Redis.

    It is what was configured, or Redis' `maxmemory` without the reserve. When other keys and connections take more
    than half of the reserve, it shrinks, so that the other half stays free.

    Args:
        configured: None takes what Redis' memory allows, which is unbounded without a `maxmemory`.

    Attributes:
        whole: the budget when nothing else needs memory; None is unbounded.
        nbytes: the budget now; None is unbounded.
    """

    def __init__(self, configured: int | None = None) -> None:
        self._configured = configured
        self.whole = self.nbytes = configured

    def follow(self, maxmemory: int, used: int, stored: int) -> None:
        """Takes in Redis' memory: its limit or 0, the bytes in use, and those of pages and codecs among them."""
        self.whole = self.nbytes = self._configured
        if maxmemory == 0:
            return
        kept = reserve(maxmemory)
        if self._configured is not None and self._configured > maxmemory - kept and once("page budget too large"):
            message = "QAQ_PAGE_BUDGET_BYTES is more than Redis' maxmemory without the reserve, which is taken instead"
            log.warning(message, configured=self._configured, maxmemory=maxmemory, reserve=kept)
        self.whole = min(maxmemory - kept, self._configured or maxmemory)
        others = max(0, used - stored)
        self.nbytes = max(0, min(self.whole, maxmemory - kept // 2 - others))


class Keeper:
    """Keeps pages and codecs within the budget while Redis' memory and its other keys change."""

    def __init__(self, redis: Redis, index: PageIndex, budget: Budget) -> None:
        self._redis, self._index, self._budget = redis, index, budget

    async def run(self) -> None:
        """Looks every `FOLLOW_EVERY_S` until cancelled."""
        while True:
            await asyncio.sleep(FOLLOW_EVERY_S)
            try:
                await self.step()
            except RedisError as error:
                if once("page budget"):
                    log.warning("cannot look at Redis' memory; trying again", error=str(error))

    async def step(self) -> None:
        """Follows Redis' memory, and drops what is over the budget and held by nobody.

        Raises:
            redis.exceptions.RedisError: Redis did not answer.
        """
        await self._index.sweep()
        memory: Mapping[str, Any] = await self._redis.info("memory")
        stored = await self._index.nbytes()
        self._budget.follow(int(memory.get("maxmemory", 0)), int(memory["used_memory"]), stored)
        budget = self._budget.nbytes
        if budget is not None and stored > budget:
            evicted = await self._index.evict(budget)
            metrics.pages_evicted.inc(evicted)
            stored = await self._index.nbytes()
        metrics.page_bytes.set(stored)
        metrics.page_budget_bytes.set(math.inf if budget is None else budget)
