"""`Originals` over gRPC: the worker's side of the cache service."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial

from pydantic import SecretStr
from qaq.v1 import originals_pb2 as pb

from qaq_core import Quantizer
from qaq_core.base.errors import OriginalsError
from qaq_core.base.pages import Page, PageShape
from qaq_core.base.rows import RowReply, RowRequest
from services.common import tracing
from services.common.background import BackgroundLoop
from services.common.channel import Dial, open_channel
from services.common.identity import Identity
from services.common.redis import connect
from services.common.registry import Registry
from services.originals.fetches import read_pages
from services.originals.held import HeldPages
from services.originals.puts import Puts
from services.originals.replicas import Finder, Replicas, Stub
from services.originals.requests import REQUEST_TIMEOUT_S, RowRequests
from services.originals.seals import Seals

FETCH_TIMEOUT_S = 30.0
MATCH_TIMEOUT_S = 5.0


class RemoteOriginals:
    """Cache services behind the `Originals` protocol. Thread-safe; `close` it.

    It runs its own event loop in a daemon thread; every method returns at once. A page is sent until a replica
    acknowledges it; other calls try a second replica and then fail with OriginalsError. Pages that are put or fetched
    here are held until they are forgotten: the store neither drops nor expires them.

    Args:
        find: lists the addresses of the cache services; runs on this object's loop.
        secret: of the deployment. identity: of the model whose pages these are, see `LoadedModel.identity`. Pages are
            sealed with both; a page with another seal is as if it were not stored.
        rows_timeout: seconds that a requantization may take.
        on_close: runs on the loop at the end, to close what `find` uses.
        dial: opens a channel to a cache service.
    """

    def __init__(
        self,
        find: Finder,
        *,
        secret: str = "",
        identity: str = "",
        rows_timeout: float = REQUEST_TIMEOUT_S,
        on_close: Callable[[], Awaitable[None]] | None = None,
        dial: Dial = open_channel,
    ) -> None:
        self._find, self._dial = find, dial
        self._on_close = on_close
        self._seals = Seals(secret, identity)
        self._rows_timeout = rows_timeout
        self._pending = 0
        self._counting = threading.Lock()
        self._background = BackgroundLoop("originals", _closed)
        self._background.submit(self._open()).result()

    @classmethod
    def at(cls, addresses: Sequence[str], *, secret: str = "", identity: str = "") -> RemoteOriginals:
        """A client of the services at these addresses, host:port."""

        async def find() -> Sequence[str]:
            return addresses

        return cls(find, secret=secret, identity=identity)

    @classmethod
    def registered(
        cls, redis_url: str | SecretStr, who: Identity | None = None, *, secret: str = "", identity: str = ""
    ) -> RemoteOriginals:
        """A client of the services that are registered in Redis, now and later."""
        redis = connect(redis_url, who, retries=1, max_connections=2)

        async def find() -> Sequence[str]:
            return [member.address for member in await Registry(redis).members("originals")]

        dial = partial(open_channel, identity=who, role="originals")
        return cls(find, secret=secret, identity=identity, on_close=redis.aclose, dial=dial)

    def put(self, pages: Sequence[Page]) -> Future[None]:
        """Done when every page is acknowledged; their data must not change before."""
        size = sum(page.shape.nbytes for page in pages)
        self._add_pending(size)
        done = self._background.submit(self._puts.put(list(pages)))
        done.add_done_callback(lambda _: self._add_pending(-size))
        return done

    @property
    def pending_bytes(self) -> int:
        """Bytes of pages put here that are neither acknowledged nor refused."""
        return self._pending

    def _add_pending(self, size: int) -> None:
        with self._counting:
            self._pending += size

    def requantize(self, request: RowRequest, quantizer: Quantizer) -> Future[RowReply]:
        return self._background.submit(self._requests.requantize(request, quantizer))

    def match(self, page_ids: Sequence[bytes]) -> Future[int]:
        return self._background.submit(self._match(list(page_ids)))

    def fetch(self, page_ids: Sequence[bytes], shape: PageShape) -> Future[list[Page | None]]:
        return self._background.submit(self._fetch(list(page_ids), shape))

    def hold(self, page_ids: Sequence[bytes]) -> None:
        self._background.submit(self._on_loop(self._held.hold, list(page_ids)))

    def forget(self, page_ids: Sequence[bytes]) -> None:
        self._background.submit(self._on_loop(self._held.forget, list(page_ids)))

    def rest(self, page_ids: Sequence[bytes]) -> None:
        self.forget(page_ids)

    def wake(self, page_ids: Sequence[bytes]) -> None:
        self.hold(page_ids)

    def close(self) -> None:
        """Ends running calls (their futures get OriginalsError) and the thread."""
        self._background.close(self._clean_up)

    # The methods below run on the loop.

    async def _open(self) -> None:
        self._replicas = Replicas(self._find, self._dial)
        self._held = HeldPages(self._replicas)
        self._puts = Puts(self._replicas, self._held, self._seals)
        self._requests = RowRequests(self._replicas, self._rows_timeout)
        self._tellers = [asyncio.create_task(tell()) for tell in (self._held.keep_touching, self._held.keep_telling)]

    async def _clean_up(self) -> None:
        await self._replicas.close()
        if self._on_close:
            await self._on_close()

    async def _on_loop(self, change: Callable[[list[bytes]], None], page_ids: list[bytes]) -> None:
        change(page_ids)

    async def _match(self, page_ids: list[bytes]) -> int:
        if not page_ids:
            return 0
        request = pb.MatchRequest(page_ids=page_ids)
        reply = await self._replicas.call(
            page_ids[0], lambda stub: stub.Match(request, timeout=MATCH_TIMEOUT_S, metadata=tracing.outgoing())
        )
        if not 0 <= reply.pages <= len(page_ids):
            raise OriginalsError(
                f"a cache service matched {reply.pages} of {len(page_ids)} pages; is it of another version?"
            )
        return int(reply.pages)

    async def _fetch(self, page_ids: list[bytes], shape: PageShape) -> list[Page | None]:
        if not page_ids:
            return []

        request = pb.FetchRequest(page_ids=page_ids, holder=self._held.holder)

        async def call(stub: Stub) -> list[Page | None]:
            replies = stub.Fetch(request, timeout=FETCH_TIMEOUT_S, metadata=tracing.outgoing())
            return await read_pages(replies, page_ids, shape, self._seals)

        pages = await self._replicas.call(page_ids[0], call)
        self._held.hold([page.id for page in pages if page is not None], told=True)
        return pages


def _closed() -> OriginalsError:
    return OriginalsError("the client of the cache services is closed")
