"""Puts: pages on their way to the cache service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import stamina
import structlog
from qaq.v1 import originals_pb2 as pb

from qaq_core.base.pages import Page
from services.common import metrics, tracing
from services.common.log import once
from services.originals import wire
from services.originals.held import HeldPages
from services.originals.replicas import NoAnswerError, Replicas
from services.originals.seals import Seals

PUTS_IN_FLIGHT = 4
PUT_TIMEOUT_S = 15.0

log = structlog.get_logger()


class Puts:
    """Sends pages, a few at a time, and each one again until a replica acknowledges it. Belongs to one event loop."""

    def __init__(self, replicas: Replicas, held: HeldPages, seals: Seals) -> None:
        self._replicas, self._held, self._seals = replicas, held, seals
        self._in_flight = asyncio.Semaphore(PUTS_IN_FLIGHT)

    async def put(self, pages: Sequence[Page]) -> None:
        """Holds pages and sends them; returns when every page is acknowledged.

        Raises:
            OriginalsError: a page was refused for good.
        """
        # Before the first await: a `forget` that follows must find the pages.
        self._held.hold((page.id for page in pages), told=True)
        await asyncio.gather(*(self._put(page) for page in pages))

    async def _put(self, page: Page) -> None:
        metrics.pages_unacked.inc()
        try:
            async with self._in_flight:
                async for attempt in stamina.retry_context(
                    on=_is_retryable,
                    attempts=None,
                    timeout=None,
                    wait_initial=0.1,
                    wait_max=2.0,
                    wait_jitter=0.5,
                ):
                    with attempt:
                        await self._put_once(page)
            metrics.pages_put.inc()
            self._held.arrived(page.id)
        finally:
            metrics.pages_unacked.dec()

    async def _put_once(self, page: Page) -> None:
        data = page.to_bytes()
        seal = self._seals.make(page.id, page.shape, data)

        async def requests() -> AsyncIterator[pb.PutRequest]:
            for chunk in wire.page_chunks(page.id, page.shape, seal, data):
                yield pb.PutRequest(chunk=chunk, holder=self._held.holder)

        await self._replicas.call(
            page.id, lambda stub: stub.Put(requests(), timeout=PUT_TIMEOUT_S, metadata=tracing.outgoing()), tries=1
        )


def _is_retryable(error: Exception) -> bool:
    if not isinstance(error, NoAnswerError):
        return False
    metrics.put_retries.inc()
    if once("put"):
        log.warning("a page was not acknowledged; sending it until it is", error=str(error))
    return True
