"""Uploads that do not end: they hold a bounded number of bytes and of places."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable

import grpc
import pytest
from pydantic import SecretStr
from qaq.v1 import originals_pb2 as pb
from qaq.v1 import originals_pb2_grpc
from redis.asyncio import Redis

from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.errors import ResourceExhausted
from services.common.settings import OriginalsSettings
from services.originals import uploads
from services.originals.server import OriginalsServer
from services.originals.uploads import Uploads
from tests.services.originals.conftest import make_pages, status
from tests.services.originals.test_service import chunks

A, B = "ipv4:10.0.0.1:5000", "ipv6:[::1]:5000"
MIB = 1 << 20


def test_bytes_are_bounded_in_all_and_of_a_peer() -> None:
    made = Uploads(100)
    with made.begin(A) as first, made.begin(A.replace("5000", "5001")) as second, made.begin(B) as third:
        first.add(50)
        second.add(25)
        with pytest.raises(ResourceExhausted, match="75 of them from this host"):
            second.add(1)
        third.add(25)
        with pytest.raises(ResourceExhausted, match="hold 100 bytes"):
            third.add(1)
        first.drop()
        third.add(1)
        assert (made.count, made.held) == (3, 51)
    assert (made.count, made.held) == (0, 0)


def test_uploads_are_bounded_in_all_and_of_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_UPLOADS", 4)
    made = Uploads(100)
    with made.begin(A), made.begin(A), made.begin(A):
        with pytest.raises(ResourceExhausted, match="3 of them from this host"):
            made.begin(A).__enter__()
        with made.begin(B), pytest.raises(ResourceExhausted, match="4 uploads have not ended"):
            made.begin(B).__enter__()
    assert made.count == 0


@pytest.fixture
async def small(redis: Redis, redis_server: EmbeddedRedis) -> AsyncIterator[originals_pb2_grpc.OriginalsStub]:
    """A cache service whose uploads may hold 8 MiB."""
    server = OriginalsServer(OriginalsSettings(redis_url=SecretStr(redis_server.url), upload_budget_bytes=8 * MIB))
    async with open_channel(await server.start()) as channel:
        yield originals_pb2_grpc.OriginalsStub(channel)
    await server.stop()


async def endless(count: int, size: int) -> AsyncIterator[pb.PutCodecRequest]:
    for _ in range(count):
        yield pb.PutCodecRequest(codec_id=bytes(16), tables=bytes(size))
    await asyncio.Event().wait()


async def test_unfinished_tables_hold_a_bounded_number_of_bytes(small: originals_pb2_grpc.OriginalsStub) -> None:
    held = [asyncio.ensure_future(small.PutCodec(endless(4, MIB), timeout=60)) for _ in range(3)]
    done, pending = await asyncio.wait(held, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    for refused in done:
        code, message = await status(refused)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "end those first" in message
    for call in pending:
        call.cancel()
    await asyncio.wait(pending)
    pages = make_pages(2)
    while (code := await outcome(small.Put(chunks(*pages), timeout=10))) is grpc.StatusCode.RESOURCE_EXHAUSTED:  # noqa: ASYNC110
        await asyncio.sleep(0.05)  # the cancelled calls have not ended there yet
    assert code is grpc.StatusCode.OK


async def outcome(call: Awaitable[object]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def silent() -> AsyncIterator[pb.PutRequest]:
    await asyncio.Event().wait()
    yield pb.PutRequest()


async def test_silent_uploads_leave_places_for_others(small: originals_pb2_grpc.OriginalsStub) -> None:
    calls = [asyncio.ensure_future(small.Put(silent(), timeout=60)) for _ in range(300)]
    most = uploads.MAX_UPLOADS * 3 // 4
    over = iter(asyncio.as_completed(calls))
    for _ in range(len(calls) - most):
        code, _ = await status(next(over))
        # UNAVAILABLE: a call that gRPC began before it knew how many one connection may have.
        assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    assert (await small.Match(pb.MatchRequest(page_ids=[bytes(32)]), timeout=10)).pages == 0
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
