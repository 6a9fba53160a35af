"""Row requests over gRPC: split among replicas, and the quantizer sent where it is not known."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import numpy as np
import structlog
from qaq.v1 import originals_pb2 as pb

from qaq_core import Quantizer
from qaq_core.base.errors import OriginalsError
from qaq_core.base.rows import RowReply, RowRequest
from services.common import metrics, tracing
from services.common.log import once
from services.originals import wire
from services.originals.batches import merge, split
from services.originals.replicas import CodecUnknownError, Replicas, Stub, choose

REQUESTS_IN_FLIGHT = 8
REQUEST_TIMEOUT_S = 5.0
CODEC_TIMEOUT_S = 15.0
CODECS_REMEMBERED = 4096

log = structlog.get_logger()


class RowRequests:
    """Sends row requests. Belongs to one event loop.

    Args:
        timeout: seconds that one call may take.
    """

    def __init__(self, replicas: Replicas, timeout: float) -> None:
        self._replicas, self._timeout = replicas, timeout
        self._in_flight = asyncio.Semaphore(REQUESTS_IN_FLIGHT)
        self._codecs: set[bytes] = set()

    async def requantize(self, request: RowRequest, quantizer: Quantizer) -> RowReply:
        """The reply to the whole request.

        Raises:
            OriginalsError: a part of it failed.
        """
        if len(request) == 0:
            return RowReply(np.zeros(0, dtype=bool), np.zeros(0, dtype=np.uint8))
        try:
            async with self._in_flight:
                addresses = await self._replicas.usable()
                parts = split(request, lambda page_id: choose(page_id, addresses))
                replies = await asyncio.gather(*(self._send(request.select(part), quantizer) for part in parts))
            return merge(request, parts, replies)
        except OriginalsError as error:
            metrics.requantize_failures.inc()
            if once("requantize"):
                log.warning("requantization failed; rows keep their bits", error=str(error))
            raise

    async def _send(self, part: RowRequest, quantizer: Quantizer) -> RowReply:
        """The rows of one replica."""
        message = wire.row_request_message(part, quantizer.id)
        page_id = next(iter(part.page_ids.values()))

        def call(stub: Stub) -> Awaitable[pb.RequantizeReply]:
            return stub.Requantize(message, timeout=self._timeout, metadata=tracing.outgoing())

        if quantizer.id not in self._codecs:
            await self._put_codec(quantizer)
        try:
            reply = await self._replicas.call(page_id, call)
        except CodecUnknownError:
            await self._put_codec(quantizer)
            reply = await self._replicas.call(page_id, call)
        return RowReply(np.frombuffer(reply.found, np.uint8) != 0, np.frombuffer(reply.planes, np.uint8))

    async def _put_codec(self, quantizer: Quantizer) -> None:
        """Sends a quantizer, and before it its base."""
        base = quantizer.base
        if base is not None and base.id not in self._codecs:
            await self._put_codec(base)
        chunks = wire.codec_chunks(quantizer.id, quantizer.to_bytes())

        def call(stub: Stub) -> Awaitable[pb.PutCodecReply]:
            return stub.PutCodec(iter(chunks), timeout=CODEC_TIMEOUT_S, metadata=tracing.outgoing())

        try:
            await self._replicas.call(quantizer.id, call)
        except CodecUnknownError:
            if base is None:
                raise
            await self._put_codec(base)
            await self._replicas.call(quantizer.id, call)
        if len(self._codecs) >= CODECS_REMEMBERED:
            self._codecs.clear()
        self._codecs.add(quantizer.id)
