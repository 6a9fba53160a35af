"""Pages and codecs in Redis, one string each; `page_format` has the stored form of a page.

Whatever is read of a page is verified. What does not fit is as if it were not stored, and is removed, so that it can
be put again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError, WatchError

from qaq_core.base.errors import CorruptPageError
from qaq_core.base.pages import PageShape
from qaq_core.base.rows import RowRequest
from services.common import metrics
from services.common.errors import InvalidArgument
from services.common.log import once
from services.originals import wire
from services.originals.budget import Budget
from services.originals.index import PageIndex
from services.originals.page_format import HEADER_BYTES, Header, PageFormat, UnknownVersionError, head_bytes
from services.originals.page_forms import PageForm
from services.originals.page_groups import GroupedPage
from services.originals.seals import Seal
from services.originals.writer import Writer

_COMMANDS = 2048  # per pipeline: bounds the memory for commands and replies

log = structlog.get_logger()


class PageStore:
    """Pages and codecs over Redis.

    Every method may raise redis.exceptions.RedisError: ConnectionError, TimeoutError, OutOfMemoryError.

    Args:
        ttl_s: seconds until a page or codec expires that is neither put nor touched again.
        budget: of the bytes of all pages and codecs in Redis.
        secret: of the deployment. Pages that were stored with another one are as if they were not stored.
        form: in which pages are stored; those of every form are read.

    Attributes:
        row_reads: rows read from Redis by this object.
        evicted, refused: pages and codecs that this object dropped for others, and that it could not store.
    """

    def __init__(
        self, redis: Redis, ttl_s: int, secret: str = "", budget: Budget | None = None, form: PageForm = "plain"
    ) -> None:
        self._redis = redis
        self._format = PageFormat(secret, form)
        self._index = PageIndex(redis, ttl_s)
        self._budget = budget or Budget()
        self._writer = Writer(self._index, self._budget)
        self.row_reads = 0

    @property
    def evicted(self) -> int:
        return self._writer.evicted

    @property
    def refused(self) -> int:
        return self._writer.refused

    async def put(
        self, page_id: bytes, shape: PageShape, seal: Seal, data: bytes | bytearray | memoryview, holder: str = ""
    ) -> bool:
        """Stores a page; returns when Redis has it. False if it was stored already; its expiry is then postponed.

        Pages that nobody holds are dropped for it when the budget is reached, the least recently used first.

        Args:
            holder: names the process that needs the page; it holds it until `release`, if it touches it meanwhile.
        Raises:
            ResourceExhausted: all others are held, too. InvalidArgument: it is larger than the whole budget.
        """
        stored = await asyncio.to_thread(self._format.pack, page_id, shape, seal, data)
        new = await self._writer.put(_page_key(page_id), stored, holder)
        if new:
            metrics.page_plain_bytes.inc(shape.nbytes)
            metrics.page_stored_bytes.inc(len(stored))
        return new

    async def match(self, page_ids: Sequence[bytes]) -> int:
        """Length of the longest chain of pages, from the first, that is stored."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for page_id in page_ids:
                pipe.exists(_page_key(page_id))
            there = await pipe.execute()
        return there.index(0) if 0 in there else len(there)

    async def get(self, page_id: bytes) -> tuple[PageShape, Seal, memoryview] | None:
        """A whole page; None if it is missing, corrupt, or of another release's version. A corrupt page is removed, so
        that it can be put again.

        One that holds NaN or infinity counts as corrupt: no worker uses it, and each would compute its tokens again.
        """
        key = _page_key(page_id)
        try:
            raw = await self._redis.get(key)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            _count_corrupt(page_id, "it is no string")
            await self._discard(key, None)
            return None
        if not isinstance(raw, bytes):
            return None
        try:
            header, data = await asyncio.to_thread(self._unpack, page_id, raw)
        except UnknownVersionError as error:
            metrics.pages_unknown.inc()
            if once("page of another version"):
                log.warning("a page of another release of QAQ is treated as missing", reason=str(error))
            return None
        except CorruptPageError as error:
            _count_corrupt(page_id, str(error))
            await self._discard(key, raw)
            return None
        return header.shape, header.seal, data

    async def holds(self, page_id: bytes) -> bool:
        """Whether a page is stored, by header and length. Anything else that is stored under its id is removed."""
        return 0 in await self._headers({0: page_id})

    async def rows(self, request: RowRequest) -> list[bytes | None]:
        """Original values of rows, read by GETRANGE; None where the page is missing or the row corrupt.

        Rows that are stored together are read once. A page with a corrupt row is removed, so that it can be put again.

        Raises:
            InvalidArgument: a page is stored with another shape.
        """
        headers = await self._headers(request.page_ids, head_bytes(request.shape))
        for number, header in headers.items():
            if header.shape != request.shape:
                name = request.page_ids[number].hex()[:12]
                raise InvalidArgument(f"page {name}… is stored as {header.shape} and the request has {request.shape}")
        page, place = request.page.tolist(), (request.offset // request.shape.row_bytes).tolist()
        wanted = [row for row, number in enumerate(page) if number in headers]
        spans = [(request.page_ids[page[row]], *headers[page[row]].span(place[row])) for row in wanted]
        different = list(dict.fromkeys(spans))
        read = dict(zip(different, await self._ranges(different), strict=True))
        stored = {row: read[span] for row, span in zip(wanted, spans, strict=True)}
        self.row_reads += len(wanted)
        metrics.redis_row_reads.inc(len(wanted))
        of_page: defaultdict[int, list[int]] = defaultdict(list)
        for row in wanted:
            of_page[page[row]].append(row)
        parts = [
            (headers[number], [place[row] for row in rows], [stored[row] for row in rows])
            for number, rows in of_page.items()
        ]
        found = await asyncio.to_thread(lambda: [header.rows(places, read) for header, places, read in parts])
        values: list[bytes | None] = [None] * len(request)
        for (number, rows), of_rows in zip(of_page.items(), found, strict=True):
            for row, value in zip(rows, of_rows, strict=True):
                values[row] = value
            if None in of_rows:
                await self.get(request.page_ids[number])  # which counts and removes it, unless it was replaced
        return values

    async def touch(self, page_ids: Sequence[bytes], holder: str = "") -> int:
        """Postpones the expiry of pages and holds them. Returns the number of them that are stored."""
        return await self._index.touch([_page_key(page_id) for page_id in page_ids], holder)

    async def release(self, page_ids: Sequence[bytes], holder: str) -> None:
        """Ends a holder's hold on pages. Those that nobody else holds may be dropped for others."""
        await self._index.release([_page_key(page_id) for page_id in page_ids], holder)

    async def put_codec(self, codec_id: bytes, tables: bytes) -> None:
        """Stores a quantizer, also in place of a damaged one.

        It goes like a page that nobody holds; its worker then puts it again.

        Raises:
            ResourceExhausted, InvalidArgument: as `put`.
        """
        await self._writer.put(_codec_key(codec_id), tables, "", replace=True)

    async def get_codec(self, codec_id: bytes) -> bytes | None:
        value = await self._redis.get(_codec_key(codec_id))
        return value if isinstance(value, bytes) else None

    @property
    def budget_bytes(self) -> int | None:
        """What all pages and codecs may take in Redis now; None is unbounded."""
        return self._budget.nbytes

    async def stored_bytes(self) -> int:
        """What all pages and codecs take in Redis, with what Redis needs for their keys."""
        return await self._index.nbytes()

    async def size(self) -> tuple[int, int]:
        """Number of pages and bytes of their values. Scans the keys: for statistics, not for the request path."""
        pages = nbytes = 0
        batch: list[bytes] = []
        async for key in self._redis.scan_iter(match="qaq:page:*", count=_COMMANDS):
            batch.append(key)
            if len(batch) == _COMMANDS:
                pages, nbytes = pages + len(batch), nbytes + await self._lengths(batch)
                batch = []
        return pages + len(batch), nbytes + await self._lengths(batch)

    async def _headers(
        self, page_ids: Mapping[int, bytes], first: int = HEADER_BYTES
    ) -> dict[int, Header | GroupedPage]:
        """The headers of the pages that are stored and have the right length. The others are removed.

        Args:
            first: bytes to read of each page; more are read of pages that need more.
        """
        async with self._redis.pipeline(transaction=False) as pipe:
            for page_id in page_ids.values():
                pipe.exists(_page_key(page_id))
                pipe.getrange(_page_key(page_id), 0, first - 1)
                pipe.strlen(_page_key(page_id))
            replies = iter(await pipe.execute(raise_on_error=False))
        headers = {}
        for (page, page_id), there, raw, size in zip(page_ids.items(), replies, replies, replies, strict=True):
            if not there:
                continue
            if isinstance(raw, Exception):
                await self.get(page_id)  # which removes it, or raises the same
                continue
            with contextlib.suppress(CorruptPageError):
                needed = head_bytes(self._format.shape(page_id, raw))
                if needed > len(raw):
                    raw = await self._redis.getrange(_page_key(page_id), 0, needed - 1)
                header = self._format.header(page_id, raw)
                if size == header.stored_bytes:
                    headers[page] = header
                    continue
            await self.get(page_id)
        return headers

    def _unpack(self, page_id: bytes, raw: bytes) -> tuple[Header | GroupedPage, memoryview]:
        """Header and data of a page that can be used.

        Raises:
            CorruptPageError: it cannot.
        """
        header, data = self._format.unpack(page_id, raw)
        if not wire.finite(header.shape, data):
            raise CorruptPageError("it holds NaN or infinity")
        return header, data

    async def _ranges(self, spans: Sequence[tuple[bytes, int, int]]) -> list[bytes]:
        """What is stored of pages: of each id from a first to a last byte."""
        read: list[bytes] = []
        for start in range(0, len(spans), _COMMANDS):
            async with self._redis.pipeline(transaction=False) as pipe:
                for page_id, first, last in spans[start : start + _COMMANDS]:
                    pipe.getrange(_page_key(page_id), first, last)
                read += await pipe.execute()
        return read

    async def _lengths(self, keys: Sequence[bytes]) -> int:
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.strlen(key)
            return sum(await pipe.execute())

    async def _discard(self, key: str, raw: bytes | None) -> None:
        """Removes a value unless it has changed since it was read; None is one that is no string."""
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(key)
            now = await pipe.get(key) if await pipe.type(key) == b"string" else None
            if now != raw:
                return
            pipe.multi()
            pipe.unlink(key)
            self._index.leave(pipe, key)
            try:
                await pipe.execute()
            except WatchError:
                log.info("a corrupt page was replaced by another client before its removal", key=key)


def _count_corrupt(page_id: bytes, reason: str) -> None:
    metrics.originals_corrupt.inc()
    if once(f"corrupt {page_id.hex()}"):
        log.warning("corrupt page; treated as missing", page=page_id.hex(), reason=reason)


def _page_key(page_id: bytes) -> str:
    return f"qaq:page:{page_id.hex()}"


def _codec_key(codec_id: bytes) -> str:
    return f"qaq:codec:{codec_id.hex()}"
