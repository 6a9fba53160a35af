"""The gRPC service over the store. It keeps no state: any number of replicas may serve one Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import structlog
import torch
from qaq.v1 import originals_pb2 as pb
from qaq.v1 import originals_pb2_grpc

from qaq_core import Quantizer
from qaq_core.base.errors import ConfigError
from qaq_core.base.rows import RowRequest
from services.common import metrics
from services.common.errors import InvalidArgument, PermissionDenied
from services.common.log import once
from services.originals import wire
from services.originals.quantizers import Quantizers
from services.originals.seals import Seals
from services.originals.store import PageStore
from services.originals.uploads import Uploads

MAX_IDS = 65_536
MAX_CODEC_BYTES = 256 << 20

log = structlog.get_logger()


class OriginalsService(originals_pb2_grpc.OriginalsServicer):
    """The calls of the service. The server's interceptor turns Redis errors and `StatusError`s into statuses.

    Args:
        secret: of the deployment; pages must be sealed with it.
        upload_bytes: of pages and tables that have not come completely.

    Attributes:
        uploads: calls that send pages or tables, and what they hold.
    """

    def __init__(self, store: PageStore, secret: str = "", upload_bytes: int = 512 << 20) -> None:
        self._store = store
        self._seals = Seals(secret)
        self.uploads = Uploads(upload_bytes)
        # One thread keeps the event loop free. Torch uses several cores for large batches; replicas use more.
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="requantize")
        self._quantizers = Quantizers(store, self._threads)
        self._rows_requantized = self._rows_missing = self._requantize_bytes = 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def Put(self, requests: AsyncIterator[pb.PutRequest], context: Any) -> pb.PutReply:
        reply = pb.PutReply()
        page: wire.PageAssembly | None = None
        with self.uploads.begin(context.peer()) as upload:
            async for request in requests:
                page = page or wire.PageAssembly(request.chunk)
                wire.check_holder(request.holder)
                upload.add(len(request.chunk.data))
                if page.add(request.chunk):
                    # The next page is read when Redis has this one: a stream needs memory for one page.
                    new = await self._put(page, request.holder)
                    reply.pages_stored += new
                    reply.pages_known += not new
                    page = None
                    upload.drop()
        if page is not None:
            raise InvalidArgument("the stream ended inside a page; its last chunk must say so")
        return reply

    async def _put(self, page: wire.PageAssembly, holder: str) -> bool:
        """Stores a page. The first one of an id is kept, unless it is not whole or not of this deployment.

        A page that is no numbers is of use to nobody: every prompt that begins with it would be computed from there.
        """
        if not self._seals.fits(page.seal, page.page_id, page.shape, page.data):
            raise PermissionDenied(
                f"page {page.page_id.hex()[:12]}… is not sealed with this cache service's secret; give it and the "
                "workers the same QAQ_SECRET"
            )
        if not page.finite:
            metrics.originals_corrupt.inc()
            if once("page that is no numbers"):
                log.warning("a worker's page holds NaN or infinity; such pages are not stored", page=page.page_id.hex())
            raise InvalidArgument(
                f"page {page.page_id.hex()[:12]}… holds NaN or infinity and is not stored; run the model in float32 or "
                "bfloat16 if float16 overflows"
            )
        facts = (page.page_id, page.shape, page.seal, page.data, holder)
        return await self._store.put(*facts) or (
            not await self._store.holds(page.page_id) and await self._store.put(*facts)
        )

    async def PutCodec(self, requests: AsyncIterator[pb.PutCodecRequest], context: Any) -> pb.PutCodecReply:
        codec_id, tables = b"", bytearray()
        with self.uploads.begin(context.peer()) as upload:
            async for request in requests:
                _check_codec_id(request.codec_id)
                if codec_id and request.codec_id != codec_id:
                    raise InvalidArgument("the stream names two codecs; send one per call")
                codec_id = request.codec_id
                if len(tables) + len(request.tables) > MAX_CODEC_BYTES:
                    raise InvalidArgument(f"the tables are over {MAX_CODEC_BYTES:,} bytes")
                upload.add(len(request.tables))
                tables += request.tables
            _check_codec_id(codec_id)
            raw = bytes(tables)
            del tables
            quantizer = await self._quantizers.parse(raw)
            if quantizer.id != codec_id:
                raise InvalidArgument("codec_id is not the fingerprint of the tables; send the quantizer's own id")
            await self._store.put_codec(codec_id, raw)
        return pb.PutCodecReply()

    async def Match(self, request: pb.MatchRequest, context: Any) -> pb.MatchReply:
        return pb.MatchReply(pages=await self._store.match(_check_ids(request.page_ids)))

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.FetchReply]:
        page_ids = _check_ids(request.page_ids)
        wire.check_holder(request.holder)
        await self._store.touch(page_ids, request.holder)  # so that none of them is dropped meanwhile
        for page_id in page_ids:
            stored = await self._store.get(page_id)
            if stored is None:
                yield pb.FetchReply(chunk=pb.PageChunk(page_id=page_id, last=True, missing=True))
                continue
            for chunk in wire.page_chunks(page_id, *stored):
                yield pb.FetchReply(chunk=chunk)

    async def Requantize(self, request: pb.RequantizeRequest, context: Any) -> pb.RequantizeReply:
        with metrics.requantize_seconds.time():
            _check_codec_id(request.codec_id)
            quantizer = await self._quantizers.get(request.codec_id)
            rows = wire.row_request_of(request, quantizer.meta_bytes)
            values = await self._store.rows(rows)
            found, planes = await self._in_thread(_requantize, quantizer, rows, values)
            for page_id in _without_numbers(rows, values, found):
                await self._store.get(page_id)  # which removes it
        self._count(found, len(planes))
        return pb.RequantizeReply(found=found.astype(np.uint8).tobytes(), planes=planes)

    async def Touch(self, request: pb.TouchRequest, context: Any) -> pb.TouchReply:
        wire.check_holder(request.holder)
        return pb.TouchReply(pages=await self._store.touch(_check_ids(request.page_ids), request.holder))

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseReply:
        wire.check_holder(request.holder)
        await self._store.release(_check_ids(request.page_ids), request.holder)
        return pb.ReleaseReply()

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsReply:
        pages, nbytes = await self._store.size()
        return pb.StatsReply(
            pages=pages,
            bytes=nbytes,
            rows_requantized=self._rows_requantized,
            rows_missing=self._rows_missing,
            redis_row_reads=self._store.row_reads,
            requantize_bytes=self._requantize_bytes,
            stored_bytes=await self._store.stored_bytes(),
            budget_bytes=self._store.budget_bytes or 0,
            evicted=self._store.evicted,
            refused=self._store.refused,
        )

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _count(self, found: np.ndarray, nbytes: int) -> None:
        hits = int(found.sum())
        self._rows_requantized += hits
        self._rows_missing += len(found) - hits
        self._requantize_bytes += nbytes
        metrics.requantize_bytes.inc(nbytes)
        metrics.originals_missing.inc(len(found) - hits)


def _requantize(quantizer: Quantizer, rows: RowRequest, values: Sequence[bytes | None]) -> tuple[np.ndarray, bytes]:
    """Which rows have originals that are numbers, and the planes that those rows lack, one after another."""
    found = np.array([value is not None for value in values], dtype=bool)
    raw = bytearray().join(value for value in values if value is not None)
    if not raw:
        return found, b""
    originals = torch.frombuffer(raw, dtype=rows.shape.torch_dtype).view(-1, rows.shape.head_dim).float()
    numbers = torch.isfinite(originals).all(1)
    if not bool(numbers.all()):
        found[found] = numbers.numpy()
        if once("rows that are no numbers"):
            log.warning("originals hold NaN or infinity; their rows are treated as missing")
    try:
        return found, quantizer.requantize(rows.select(found), originals[numbers]).tobytes()
    except (ConfigError, IndexError, RuntimeError) as error:
        raise InvalidArgument(f"the codec's tables do not fit pages of {rows.shape}: {error}") from error


def _without_numbers(rows: RowRequest, values: Sequence[bytes | None], found: np.ndarray) -> set[bytes]:
    """The pages of rows that are there and are no numbers."""
    there = np.array([value is not None for value in values], dtype=bool)
    return {rows.page_ids[page] for page in np.unique(rows.page[there & ~found]).tolist()}


def _check_codec_id(codec_id: bytes) -> None:
    if len(codec_id) != wire.CODEC_ID_BYTES:
        raise InvalidArgument(f"codec_id has {len(codec_id)} bytes and must have {wire.CODEC_ID_BYTES}")


def _check_ids(ids: Any) -> list[bytes]:
    if len(ids) > MAX_IDS:
        raise InvalidArgument(f"{len(ids):,} page ids were given and at most {MAX_IDS:,} are accepted")
    wire.check_page_ids(ids)
    return list(ids)
