"""Pages in Redis: one string each, a fixed header and the raw values.

Header, 64 bytes little-endian: magic, version, dtype, layers, kv_heads, tokens, head_dim, bytes of data, BLAKE3 of
these fields and the data (16 bytes), zeros. Reading a whole page verifies the checksum; reading rows verifies that
the header is valid and has the requested shape.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping, Sequence

import structlog
from blake3 import blake3
from redis.asyncio import Redis
from redis.exceptions import ResponseError, WatchError

from qaq_core.base.errors import CorruptPageError
from qaq_core.base.pages import PageShape
from qaq_core.base.rows import RowRequest
from services.common import metrics
from services.common.errors import InvalidArgument, ResourceExhausted
from services.common.log import once
from services.common.redis import is_full
from services.originals.budget import Budget
from services.originals.index import PageIndex

HEADER_BYTES = 64
RETRY_AFTER_MS = 2000
_MAGIC, _VERSION = b"QAQP", 1
_FIELDS = struct.Struct("<4sHH4IQ")
_SUM_BYTES = 16
_DTYPES = ("float32", "float16", "bfloat16")
_WRITES_IN_FLIGHT = 4
"""Pages on their way to Redis, which needs memory for each beside the budget."""
_SLACK = 4 << 20
"""Dropped beside a page's own bytes when others have filled Redis, for what a write needs meanwhile."""
_COMMANDS = 2048  # per pipeline: bounds the memory for commands and replies

log = structlog.get_logger()


def pack_page(shape: PageShape, data: bytes | bytearray | memoryview) -> bytes:
    """The stored form of a page."""
    fields = _fields(shape)
    return b"".join((fields, _checksum(fields, data), bytes(HEADER_BYTES - len(fields) - _SUM_BYTES), data))


def read_header(raw: bytes) -> tuple[PageShape, bytes]:
    """Shape and checksum of a stored page's first 64 bytes.

    Raises:
        CorruptPageError: the header is not valid.
    """
    if len(raw) < HEADER_BYTES:
        raise CorruptPageError("the header is truncated")
    magic, version, dtype, layers, kv_heads, tokens, head_dim, size = _FIELDS.unpack_from(raw)
    if magic != _MAGIC or version != _VERSION or dtype >= len(_DTYPES):
        raise CorruptPageError("the header is not of this version")
    shape = PageShape(layers, kv_heads, tokens, head_dim, _DTYPES[dtype])
    if shape.nbytes != size:
        raise CorruptPageError("the header names a size that is not that of its shape")
    return shape, raw[_FIELDS.size : _FIELDS.size + _SUM_BYTES]


def unpack_page(raw: bytes) -> tuple[PageShape, memoryview]:
    """Shape and data of a stored page.

    Raises:
        CorruptPageError: header, length or checksum is wrong.
    """
    shape, checksum = read_header(raw)
    data = memoryview(raw)[HEADER_BYTES:]
    if len(data) != shape.nbytes or _checksum(_fields(shape), data) != checksum:
        raise CorruptPageError("the data does not match its checksum")
    return shape, data


class PageStore:
    """Pages and codecs over Redis.

    Every method may raise redis.exceptions.RedisError: ConnectionError, TimeoutError, OutOfMemoryError.

    Args:
        ttl_s: seconds until a page or codec expires that is neither put nor touched again.
        budget: of the bytes of all pages and codecs in Redis.

    Attributes:
        row_reads: rows read from Redis by this object.
        evicted, refused: pages and codecs that this object dropped for others, and that it could not store.
    """

    def __init__(self, redis: Redis, ttl_s: int, budget: Budget | None = None) -> None:
        self._redis = redis
        self._index = PageIndex(redis, ttl_s)
        self._budget = budget or Budget()
        self._writing = asyncio.Semaphore(_WRITES_IN_FLIGHT)
        self.row_reads = self.evicted = self.refused = 0

    async def put(
        self, page_id: bytes, shape: PageShape, data: bytes | bytearray | memoryview, holder: str = ""
    ) -> bool:
        """Stores a page; returns when Redis has it. False if it was stored already; its expiry is then postponed.

        Pages that nobody holds are dropped for it when the budget is reached, the least recently used first.

        Args:
            holder: names the process that needs the page; it holds it until `release`, if it touches it meanwhile.
        Raises:
            ResourceExhausted: all others are held, too. InvalidArgument: it is larger than the whole budget.
        """
        return await self._store(_page_key(page_id), pack_page(shape, data), holder)

    async def match(self, page_ids: Sequence[bytes]) -> int:
        """Length of the longest chain of pages, from the first, that is stored."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for page_id in page_ids:
                pipe.exists(_page_key(page_id))
            there = await pipe.execute()
        return there.index(0) if 0 in there else len(there)

    async def get(self, page_id: bytes) -> tuple[PageShape, memoryview] | None:
        """A whole page; None if it is missing or corrupt. A corrupt page is removed, so that it can be put again."""
        key = _page_key(page_id)
        raw = await self._redis.get(key)
        if not isinstance(raw, bytes):
            return None
        try:
            return unpack_page(raw)
        except CorruptPageError as error:
            _count_corrupt(page_id, error)
            await self._discard(key, raw)
            return None

    async def rows(self, request: RowRequest) -> list[bytes | None]:
        """Original values of rows, read by GETRANGE; None where the page is missing or corrupt.

        Raises:
            InvalidArgument: a page is stored with another shape.
        """
        shape, page, offset = request.shape, request.page.tolist(), request.offset.tolist()
        valid = await self._valid_pages(request.page_ids, shape)
        keys = {number: _page_key(request.page_ids[number]) for number in valid}
        wanted = [row for row, number in enumerate(page) if number in valid]
        values: list[bytes | None] = [None] * len(request)
        for start in range(0, len(wanted), _COMMANDS):
            rows = wanted[start : start + _COMMANDS]
            async with self._redis.pipeline(transaction=False) as pipe:
                for row in rows:
                    first = HEADER_BYTES + offset[row]
                    pipe.getrange(keys[page[row]], first, first + shape.row_bytes - 1)
                read = await pipe.execute()
            self.row_reads += len(rows)
            metrics.redis_row_reads.inc(len(rows))
            for row, value in zip(rows, read, strict=True):
                values[row] = value if len(value) == shape.row_bytes else None
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
        await self._store(_codec_key(codec_id), tables, "", replace=True)

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

    async def _store(self, key: str, value: bytes, holder: str, replace: bool = False) -> bool:
        """Sets a key within the budget; whether it was new. Makes room as long as there is something to drop."""
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

    async def _valid_pages(self, page_ids: Mapping[int, bytes], shape: PageShape) -> set[int]:
        """Numbers of the pages that are stored with a valid header."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for page_id in page_ids.values():
                pipe.getrange(_page_key(page_id), 0, HEADER_BYTES - 1)
            headers = await pipe.execute()
        stored = zip(page_ids.items(), headers, strict=True)
        return {page for (page, page_id), header in stored if _is_valid(page_id, header, shape)}

    async def _lengths(self, keys: Sequence[bytes]) -> int:
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.strlen(key)
            return sum(await pipe.execute())

    async def _discard(self, key: str, raw: bytes) -> None:
        """Removes a value unless it has changed since it was read."""
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(key)
            if await pipe.get(key) != raw:
                return
            pipe.multi()
            pipe.unlink(key)
            self._index.leave(pipe, key)
            try:
                await pipe.execute()
            except WatchError:
                log.info("a corrupt page was replaced by another client before its removal", key=key)


def _is_valid(page_id: bytes, header: bytes, shape: PageShape) -> bool:
    if not header:
        return False
    try:
        stored, _ = read_header(header)
    except CorruptPageError as error:
        _count_corrupt(page_id, error)
        return False
    if stored != shape:
        raise InvalidArgument(f"page {page_id.hex()[:12]}… is stored as {stored} and the request has {shape}")
    return True


def _count_corrupt(page_id: bytes, error: CorruptPageError) -> None:
    metrics.originals_corrupt.inc()
    if once(f"corrupt {page_id.hex()}"):
        log.warning("corrupt page; treated as missing", page=page_id.hex(), reason=str(error))


def _fields(shape: PageShape) -> bytes:
    dtype = _DTYPES.index(shape.dtype)
    return _FIELDS.pack(
        _MAGIC, _VERSION, dtype, shape.layers, shape.kv_heads, shape.tokens, shape.head_dim, shape.nbytes
    )


def _checksum(fields: bytes, data: bytes | bytearray | memoryview) -> bytes:
    return blake3(fields).update(data).digest(_SUM_BYTES)


def _page_key(page_id: bytes) -> str:
    return f"qaq:page:{page_id.hex()}"


def _codec_key(codec_id: bytes) -> str:
    return f"qaq:codec:{codec_id.hex()}"
