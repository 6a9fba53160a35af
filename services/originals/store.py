"""Pages in Redis: one string each, a fixed header and the raw values.

Header, 64 bytes little-endian: magic, version, dtype, layers, kv_heads, tokens, head_dim, bytes of data,
BLAKE3 of all of that and the data (16 bytes), zeros. Reading a whole page verifies the checksum; reading
rows verifies that the header is sound and of the shape that was asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import structlog
from blake3 import blake3
from redis.asyncio import Redis
from redis.exceptions import WatchError

from qaq_core.base.errors import CorruptPageError
from qaq_core.base.pages import PageShape
from services.common import metrics
from services.common.errors import InvalidArgument
from services.common.log import once

HEADER_BYTES = 64
CODEC_TTL_S = 7 * 24 * 3600
_MAGIC, _VERSION = b"QAQP", 1
_FACTS = struct.Struct("<4sHH4IQ")
_SUM_BYTES = 16
_DTYPES = ("float32", "float16", "bfloat16")
_COMMANDS = 2048  # in one pipeline: bounds what waits in memory on both ends

log = structlog.get_logger()


def pack_page(shape: PageShape, data: bytes | bytearray | memoryview) -> bytes:
    """The stored form of a page."""
    facts = _facts(shape)
    return b"".join((facts, _checksum(facts, data), bytes(HEADER_BYTES - len(facts) - _SUM_BYTES), data))


def read_header(raw: bytes) -> tuple[PageShape, bytes]:
    """Shape and checksum of a stored page's first 64 bytes.

    Raises:
        CorruptPageError: they are not a header.
    """
    if len(raw) < HEADER_BYTES:
        raise CorruptPageError("the header is cut off")
    magic, version, dtype, layers, kv_heads, tokens, head_dim, size = _FACTS.unpack_from(raw)
    if magic != _MAGIC or version != _VERSION or dtype >= len(_DTYPES):
        raise CorruptPageError("the header is not one of this version")
    shape = PageShape(layers, kv_heads, tokens, head_dim, _DTYPES[dtype])
    if shape.nbytes != size:
        raise CorruptPageError("the header contradicts itself")
    return shape, raw[_FACTS.size : _FACTS.size + _SUM_BYTES]


def unpack_page(raw: bytes) -> tuple[PageShape, memoryview]:
    """Shape and data of a stored page.

    Raises:
        CorruptPageError: header, length or checksum is wrong.
    """
    shape, checksum = read_header(raw)
    data = memoryview(raw)[HEADER_BYTES:]
    if len(data) != shape.nbytes or _checksum(_facts(shape), data) != checksum:
        raise CorruptPageError("the data does not match its checksum")
    return shape, data


class PageStore:
    """Pages and codecs over Redis.

    Every method raises redis.exceptions.RedisError as it comes: ConnectionError, TimeoutError, OutOfMemoryError.

    Attributes:
        row_reads: rows that were read from Redis since this store was made.
    """

    def __init__(self, redis: Redis, ttl_s: int) -> None:
        self._redis = redis
        self._ttl_s = ttl_s
        self.row_reads = 0

    async def put(self, page_id: bytes, shape: PageShape, data: bytes | bytearray | memoryview) -> bool:
        """Stores a page; returns when Redis has it. False if it was there: then its life is prolonged."""
        new = await self._redis.set(_page_key(page_id), pack_page(shape, data), ex=self._ttl_s, nx=True)
        if not new:
            await self.touch([page_id])
        return bool(new)

    async def match(self, page_ids: Sequence[bytes]) -> int:
        """How many pages, from the first, are there without a gap."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for page_id in page_ids:
                pipe.exists(_page_key(page_id))
            there = await pipe.execute()
        return there.index(0) if 0 in there else len(there)

    async def get(self, page_id: bytes) -> tuple[PageShape, memoryview] | None:
        """A whole page; None if it is missing or corrupt. A corrupt one is removed and can be put again."""
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

    async def rows(
        self, page_ids: Sequence[bytes], shape: PageShape, page: np.ndarray, offset: np.ndarray
    ) -> list[bytes | None]:
        """Raw values of rows, read by GETRANGE; None where the page is missing or corrupt.

        Args:
            page: int [n], index into page_ids. offset: int [n], the row's place in the page's data.
        Raises:
            InvalidArgument: a page was stored with another shape.
        """
        sound = await self._sound(page_ids, shape)
        wanted = [i for i, index in enumerate(page) if sound[index]]
        answer: list[bytes | None] = [None] * len(page)
        for start in range(0, len(wanted), _COMMANDS):
            some = wanted[start : start + _COMMANDS]
            async with self._redis.pipeline(transaction=False) as pipe:
                for i in some:
                    first = HEADER_BYTES + int(offset[i])
                    pipe.getrange(_page_key(page_ids[page[i]]), first, first + shape.row_bytes - 1)
                values = await pipe.execute()
            self.row_reads += len(some)
            metrics.redis_row_reads.inc(len(some))
            for i, value in zip(some, values, strict=True):
                answer[i] = value if len(value) == shape.row_bytes else None
        return answer

    async def touch(self, page_ids: Sequence[bytes]) -> int:
        """Prolongs the life of pages. Returns how many are there."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for page_id in page_ids:
                pipe.expire(_page_key(page_id), self._ttl_s)
            return sum(await pipe.execute())

    async def put_codec(self, codec_id: bytes, tables: bytes, own: bool = False) -> None:
        """Stores a model's tables, or what is a sequence's own, for as long as its pages."""
        await self._redis.set(_codec_key(codec_id), tables, ex=self._ttl_s if own else CODEC_TTL_S)

    async def get_codec(self, codec_id: bytes) -> bytes | None:
        value = await self._redis.get(_codec_key(codec_id))
        return value if isinstance(value, bytes) else None

    async def size(self) -> tuple[int, int]:
        """Pages and bytes of their values. Scans the keys: for people, not for the request path."""
        pages = nbytes = 0
        batch: list[bytes] = []
        async for key in self._redis.scan_iter(match="qaq:page:*", count=_COMMANDS):
            batch.append(key)
            if len(batch) == _COMMANDS:
                pages, nbytes = pages + len(batch), nbytes + await self._lengths(batch)
                batch = []
        return pages + len(batch), nbytes + await self._lengths(batch)

    async def _sound(self, page_ids: Sequence[bytes], shape: PageShape) -> list[bool]:
        """Whether each page is there with a sound header."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for page_id in page_ids:
                pipe.getrange(_page_key(page_id), 0, HEADER_BYTES - 1)
            headers = await pipe.execute()
        return [_is_sound(page_id, raw, shape) for page_id, raw in zip(page_ids, headers, strict=True)]

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
            try:
                await pipe.execute()
            except WatchError:
                log.info("a corrupt page was replaced before it was removed", key=key)


def _is_sound(page_id: bytes, header: bytes, shape: PageShape) -> bool:
    if not header:
        return False
    try:
        stored, _ = read_header(header)
    except CorruptPageError as error:
        _count_corrupt(page_id, error)
        return False
    if stored != shape:
        raise InvalidArgument(f"page {page_id.hex()[:12]}… is stored as {stored} and the request says {shape}")
    return True


def _count_corrupt(page_id: bytes, error: CorruptPageError) -> None:
    metrics.originals_corrupt.inc()
    if once(f"corrupt {page_id.hex()}"):
        log.warning("corrupt page; treated as missing", page=page_id.hex(), reason=str(error))


def _facts(shape: PageShape) -> bytes:
    dtype = _DTYPES.index(shape.dtype)
    return _FACTS.pack(
        _MAGIC, _VERSION, dtype, shape.layers, shape.kv_heads, shape.tokens, shape.head_dim, shape.nbytes
    )


def _checksum(facts: bytes, data: bytes | bytearray | memoryview) -> bytes:
    return blake3(facts).update(data).digest(_SUM_BYTES)


def _page_key(page_id: bytes) -> str:
    return f"qaq:page:{page_id.hex()}"


def _codec_key(codec_id: bytes) -> str:
    return f"qaq:codec:{codec_id.hex()}"
