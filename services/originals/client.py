"""`Originals` over gRPC: what a worker calls."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import grpc
import numpy as np
import stamina
import structlog
from pydantic import SecretStr
from qaq.v1 import originals_pb2 as pb
from qaq.v1 import originals_pb2_grpc

from qaq_core import Quantizer
from qaq_core.base.errors import OriginalsError
from qaq_core.base.pages import Page, PageShape
from qaq_core.base.rows import RowReply, RowRequest
from services.common import metrics
from services.common.background import BackgroundLoop
from services.common.errors import StatusError
from services.common.log import once
from services.common.redis import connect
from services.common.registry import Registry
from services.originals import wire
from services.originals.batches import merge, split
from services.originals.replicas import Finder, NoAnswerError, Replicas, choose

T = TypeVar("T")
Stub = originals_pb2_grpc.OriginalsStub

PUTS_IN_FLIGHT = 4
BATCHES_IN_FLIGHT = 8
PUT_TIMEOUT_S = 15.0
ROWS_TIMEOUT_S = 5.0
FETCH_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 5.0
CODECS_REMEMBERED = 4096
TOUCH_EVERY_S = 60.0
_TOUCH_IDS = 4096
_TRIES = 2
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_LATER = (*_GONE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)

log = structlog.get_logger()


class RemoteOriginals:
    """Cache services behind the `Originals` protocol. Thread-safe; `close` it.

    It runs its own event loop in a daemon thread; every method returns at once. Pages are sent until a
    service acknowledges them, a few at a time; other calls try a second replica and then fail with
    OriginalsError. The lives of pages that were put or fetched are prolonged until they are forgotten.

    Args:
        find: lists the addresses of the cache services; runs on this object's loop.
        rows_timeout: seconds that a re-quantization may take.
        on_close: runs on the loop at the end, to close what `find` uses.
    """

    def __init__(
        self,
        find: Finder,
        *,
        rows_timeout: float = ROWS_TIMEOUT_S,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._find = find
        self._on_close = on_close
        self._rows_timeout = rows_timeout
        self._held: Counter[bytes] = Counter()
        self._codecs: set[bytes] = set()
        self._pending = 0
        self._counting = threading.Lock()
        self._background = BackgroundLoop("originals", _closed)
        self._background.submit(self._open()).result()

    @classmethod
    def at(cls, addresses: Sequence[str]) -> RemoteOriginals:
        """Of services whose addresses are known."""

        async def find() -> Sequence[str]:
            return addresses

        return cls(find)

    @classmethod
    def registered(cls, redis_url: str | SecretStr) -> RemoteOriginals:
        """Of the services that are listed in Redis; ones that come and go are noticed."""
        redis = connect(redis_url, retries=1, max_connections=2)

        async def find() -> Sequence[str]:
            return [member.address for member in await Registry(redis).members("originals")]

        return cls(find, on_close=redis.aclose)

    def put(self, pages: Sequence[Page]) -> Future[None]:
        """Done when every page is acknowledged; their data must not change before."""
        size = sum(page.shape.nbytes for page in pages)
        self._add_pending(size)
        done = self._background.submit(self._put_all(list(pages)))
        done.add_done_callback(lambda _: self._add_pending(-size))
        return done

    @property
    def pending_bytes(self) -> int:
        return self._pending

    def _add_pending(self, size: int) -> None:
        with self._counting:
            self._pending += size

    def requantize(self, request: RowRequest, quantizer: Quantizer) -> Future[RowReply]:
        return self._background.submit(self._requantize(request, quantizer))

    def match(self, page_ids: Sequence[bytes]) -> Future[int]:
        return self._background.submit(self._match(list(page_ids)))

    def fetch(self, page_ids: Sequence[bytes], shape: PageShape) -> Future[list[Page | None]]:
        return self._background.submit(self._fetch(list(page_ids), shape))

    def hold(self, page_ids: Sequence[bytes]) -> None:
        """One more sequence has these, which were put or fetched here."""
        self._background.submit(self._hold(list(page_ids)))

    def forget(self, page_ids: Sequence[bytes]) -> None:
        """Their lives are no longer prolonged, once everybody who put or fetched them here has forgotten them."""
        self._background.submit(self._forget(list(page_ids)))

    def close(self) -> None:
        """Ends what is running (those futures get OriginalsError) and the thread."""
        self._background.close(self._clean_up)

    # On the loop from here.

    async def _open(self) -> None:
        self._replicas = Replicas(self._find)
        self._puts = asyncio.Semaphore(PUTS_IN_FLIGHT)
        self._batches = asyncio.Semaphore(BATCHES_IN_FLIGHT)
        self._toucher = asyncio.create_task(self._keep_touching())

    async def _clean_up(self) -> None:
        await self._replicas.close()
        if self._on_close:
            await self._on_close()

    async def _put_all(self, pages: list[Page]) -> None:
        await asyncio.gather(*(self._put(page) for page in pages))

    async def _put(self, page: Page) -> None:
        # Before the first await: whoever forgets a page that is still under way takes this back.
        self._held[page.id] += 1
        metrics.pages_unacked.inc()
        try:
            async with self._puts:
                async for attempt in stamina.retry_context(
                    on=_worth_repeating,
                    attempts=None,
                    timeout=None,
                    wait_initial=0.1,
                    wait_max=2.0,
                    wait_jitter=0.5,
                ):
                    with attempt:
                        await self._put_once(page)
        finally:
            metrics.pages_unacked.dec()

    async def _put_once(self, page: Page) -> None:
        data = page.to_bytes()

        async def requests() -> AsyncIterator[pb.PutRequest]:
            for chunk in wire.pieces(page.id, page.shape, data):
                yield pb.PutRequest(chunk=chunk)

        await self._call(page.id, lambda stub: stub.Put(requests(), timeout=PUT_TIMEOUT_S), tries=1)

    async def _requantize(self, request: RowRequest, quantizer: Quantizer) -> RowReply:
        if len(request) == 0:
            return RowReply(np.zeros(0, dtype=bool), np.zeros(0, dtype=np.uint8))
        try:
            async with self._batches:
                addresses = await self._replicas.usable()
                parts = split(request, lambda page_id: choose(page_id, addresses))
                replies = await asyncio.gather(*(self._rows(request.select(part), quantizer) for part in parts))
            return merge(request, parts, replies)
        except OriginalsError as error:
            metrics.requantize_failures.inc()
            if once("requantize"):
                log.warning("re-quantization failed; tokens keep their bits", error=str(error))
            raise

    async def _rows(self, part: RowRequest, quantizer: Quantizer) -> RowReply:
        """Rows of one replica; gives it the codec first if it does not know it."""
        message = wire.rows_message(part, quantizer.id)
        page_id = part.page_ids[part.page[0]]

        def call(stub: Stub) -> Awaitable[pb.RequantizeReply]:
            return stub.Requantize(message, timeout=self._rows_timeout)

        if quantizer.id not in self._codecs:
            await self._put_codec(quantizer)
        try:
            reply = await self._call(page_id, call)
        except _CodecUnknown:
            await self._put_codec(quantizer)
            reply = await self._call(page_id, call)
        return RowReply(np.frombuffer(reply.found, np.uint8) != 0, np.frombuffer(reply.planes, np.uint8))

    async def _put_codec(self, quantizer: Quantizer) -> None:
        """Gives the service a quantizer, and before it the one that it rests on."""
        base = quantizer.base
        if base is not None and base.id not in self._codecs:
            await self._put_codec(base)
        pieces = wire.codec_pieces(quantizer.id, quantizer.to_bytes())

        def call(stub: Stub) -> Awaitable[pb.PutCodecReply]:
            return stub.PutCodec(iter(pieces), timeout=PUT_TIMEOUT_S)

        try:
            await self._call(quantizer.id, call)
        except _CodecUnknown:
            if base is None:
                raise
            await self._put_codec(base)
            await self._call(quantizer.id, call)
        if len(self._codecs) >= CODECS_REMEMBERED:
            self._codecs.clear()
        self._codecs.add(quantizer.id)

    async def _match(self, page_ids: list[bytes]) -> int:
        if not page_ids:
            return 0
        request = pb.MatchRequest(page_ids=page_ids)
        reply = await self._call(page_ids[0], lambda stub: stub.Match(request, timeout=CALL_TIMEOUT_S))
        return int(reply.pages)

    async def _fetch(self, page_ids: list[bytes], shape: PageShape) -> list[Page | None]:
        if not page_ids:
            return []

        async def call(stub: Stub) -> dict[bytes, Page]:
            pages = {}
            page: wire.Assembly | None = None
            async for reply in stub.Fetch(pb.FetchRequest(page_ids=page_ids), timeout=FETCH_TIMEOUT_S):
                if reply.chunk.missing:
                    continue
                page = page or wire.Assembly(reply.chunk)
                if page.add(reply.chunk):
                    pages[page.page_id] = page.page()
                    page = None
            return pages

        pages = await self._call(page_ids[0], call)
        if any(page.shape != shape for page in pages.values()):
            raise OriginalsError(f"stored pages are not {shape}; do the workers differ in page_tokens?")
        self._held.update(pages.keys())
        return [pages.get(page_id) for page_id in page_ids]

    async def _call(self, key: bytes, call: Callable[[Stub], Awaitable[T]], tries: int = _TRIES) -> T:
        """One call to the replica of `key`, and to another if that one does not answer.

        Raises:
            OriginalsError: says which service and why.
        """
        for left in reversed(range(tries)):
            address = choose(key, await self._replicas.usable())
            try:
                return await call(self._replicas.stub(address))
            except grpc.aio.AioRpcError as error:
                if error.code() in _GONE:
                    self._replicas.avoid(address)
                    if left:
                        continue
                raise _translated(address, error) from error
            except StatusError as error:  # what wire's checks say of an answer
                raise OriginalsError(f"cache service {address} sent a broken page: {error}") from error
        raise AssertionError("unreachable: the last try returns or raises")

    async def _keep_touching(self) -> None:
        while True:
            await asyncio.sleep(TOUCH_EVERY_S)
            held = list(self._held)
            for start in range(0, len(held), _TOUCH_IDS):
                await self._touch(held[start : start + _TOUCH_IDS])

    async def _touch(self, page_ids: list[bytes]) -> None:
        request = pb.TouchRequest(page_ids=page_ids)
        try:
            await self._call(page_ids[0], lambda stub: stub.Touch(request, timeout=CALL_TIMEOUT_S))
        except OriginalsError as error:
            if once("touch"):
                log.warning("the lives of pages could not be prolonged; trying on", error=str(error))

    async def _hold(self, page_ids: list[bytes]) -> None:
        self._held.update(page_ids)

    async def _forget(self, page_ids: list[bytes]) -> None:
        for page_id in page_ids:
            self._held[page_id] -= 1
            if self._held[page_id] <= 0:
                del self._held[page_id]


class _CodecUnknown(OriginalsError):
    """The service wants PutCodec first."""


def _closed() -> OriginalsError:
    return OriginalsError("the client of the cache services is closed")


def _translated(address: str, error: grpc.aio.AioRpcError) -> OriginalsError:
    code = error.code()
    message = f"cache service {address}: {code.name}: {error.details()}"
    if code in _LATER:
        return NoAnswerError(message)
    return _CodecUnknown(message) if code is grpc.StatusCode.FAILED_PRECONDITION else OriginalsError(message)


def _worth_repeating(error: Exception) -> bool:
    if not isinstance(error, NoAnswerError):
        return False
    metrics.put_retries.inc()
    if once("put"):
        log.warning("a page was not acknowledged; sending it again until it is", error=str(error))
    return True
