"""What another release has written to Redis is read as it was meant, or is a miss: never anything else."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from pydantic import SecretStr
from qaq.v1 import originals_pb2, originals_pb2_grpc
from redis.asyncio import Redis

from qaq_core.base.rows import RowRequest
from qaq_core.base.widths import WIDTHS
from qaq_core.quantization import quantizer as quantizers
from services.common import metrics, registry
from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.errors import NotFound
from services.common.registry import Registry
from services.common.settings import OriginalsSettings
from services.originals import page_format, wire
from services.originals.client import RemoteOriginals
from services.originals.index import PageIndex
from services.originals.server import OriginalsServer
from services.router import session
from services.router.sessions import SessionDirectory
from tests.services.metric import value
from tools.record_store import FORMS, LOG, MODEL, SECRET, SHAPE, record, restore

RECORDED = sorted(Path(__file__).parent.glob("store_*.json"))
EXACT = ("plain", "lossless")
ALLOWED = {"float16": 1e-3, "int8": 0.05}
"""Largest errors of values around 1."""


@pytest.fixture(params=RECORDED, ids=[path.stem for path in RECORDED])
async def told(request: pytest.FixtureRequest, redis: Redis) -> dict[str, Any]:
    """What a recorded store says. It is in Redis."""
    recorded = json.loads(request.param.read_text())
    await restore(redis, recorded["keys"])
    told: dict[str, Any] = recorded["told"]
    return told


@pytest.fixture
async def address(redis: Redis, redis_server: EmbeddedRedis) -> AsyncIterator[str]:
    """Of a cache service of this release."""
    server = OriginalsServer(OriginalsSettings(redis_url=SecretStr(redis_server.url), secret=SecretStr(SECRET)))
    yield await server.start()
    await server.stop()


@pytest.fixture
def worker(address: str) -> Any:
    """What a worker of this release reads with."""
    client = RemoteOriginals.at([address], secret=SECRET, identity=MODEL)
    yield client
    client.close()


async def fetched(worker: Any, told: dict[str, Any]) -> list[Any]:
    ids = [bytes.fromhex(told["pages"][form][0]) for form in FORMS]
    return await asyncio.wrap_future(worker.fetch(ids, SHAPE))


async def test_a_worker_reads_recorded_pages(told: dict[str, Any], worker: Any) -> None:
    pages = await fetched(worker, told)
    for form, page in zip(FORMS, pages, strict=True):
        put = base64.b64decode(told["pages"][form][1])
        if form in EXACT:
            assert page.to_bytes() == put
        else:
            data = torch.frombuffer(bytearray(put), dtype=torch.float32).view(SHAPE.dims)
            assert (page.data - data).abs().max() < ALLOWED[form]


async def test_their_bytes_and_order_go_on(told: dict[str, Any], redis: Redis, address: str) -> None:
    index = PageIndex(redis, 3600)
    held = await index.nbytes()
    assert held > len(FORMS) * 1000
    assert await index.evict(held // 2) > 0
    assert 0 < await index.nbytes() <= held // 2


async def test_a_cache_service_reads_a_recorded_codec(told: dict[str, Any], redis: Redis, address: str) -> None:
    raw = await redis.get(f"qaq:codec:{told['codec']}")
    assert quantizers.Quantizer.from_bytes(raw).id.hex() == told["codec"]


async def test_a_router_reads_a_recorded_session(told: dict[str, Any], redis: Redis) -> None:
    directory = SessionDirectory(redis, 3600)
    session = await directory.get(told["session"], "t")
    assert (session.model, session.kept) == ("m", True)
    assert (session.cache.preset, session.cache.target_bits) == ("balanced", 2.5)
    assert await directory.tokens(session.id) == LOG == told["log"]
    assert [page.hex() for page in await directory.pages(session.id)] == [told["pages"]["plain"][0]]
    turn = await directory.turn(session.id)
    assert turn is not None
    assert list(turn.token_ids) == LOG[:2]
    assert [listing.session.id for listing in await directory.list("t")] == [session.id]


async def test_a_recorded_server_is_found(told: dict[str, Any], redis: Redis) -> None:
    (member,) = await Registry(redis).members("worker")
    assert (member.address, member.info) == ("10.0.0.1:7710", {"pid": 1, "model": "m"})


async def test_what_this_release_writes_is_what_was_recorded(redis: Redis) -> None:
    """Otherwise record it: the file that is last is of this release."""
    recorded = json.loads(RECORDED[-1].read_text())
    now = await record(redis)
    assert now["told"]["pages"] == recorded["told"]["pages"]
    same = [key for key in recorded["keys"] if key.startswith(("qaq:page:", "qaq:codec:"))]
    assert len(same) == len(FORMS) + 1
    for key in same:
        assert now["keys"][key] == recorded["keys"][key], "the form of what is stored has changed; give it a version"


async def test_what_a_newer_release_wrote_is_a_miss_and_stays(
    redis: Redis, worker: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(page_format, "_VERSION", 9)
        newer.setattr(registry, "VERSION", 2)
        newer.setattr(session, "VERSION", 2)
        written = await record(redis)
        await restore(redis, written["keys"])
    told, unknown, corrupt = written["told"], value(metrics.pages_unknown), value(metrics.originals_corrupt)
    pages = dict(zip(FORMS, await fetched(worker, told), strict=True))
    assert pages["plain"] is None
    assert pages["lossless"] is not None
    assert value(metrics.pages_unknown) > unknown
    assert value(metrics.originals_corrupt) == corrupt
    assert await redis.exists(f"qaq:page:{told['pages']['plain'][0]}")  # the newer release still has it
    with pytest.raises(NotFound):
        await SessionDirectory(redis, 3600).get(told["session"], "t")
    assert await Registry(redis).members("worker") == []


async def test_a_newer_codec_is_asked_for_again(redis: Redis, address: str, told: dict[str, Any]) -> None:
    """By the worker, which then puts its own."""
    tensors = quantizers.load_tensors(await redis.get(f"qaq:codec:{told['codec']}"))
    note = json.loads(bytes(tensors[quantizers._SETTINGS].numpy())) | {"version": 2}
    tensors[quantizers._SETTINGS] = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
    await redis.set(f"qaq:codec:{told['codec']}", quantizers.save_tensors(tensors))
    page = bytes.fromhex(told["pages"]["plain"][0])
    async with open_channel(address) as channel:
        stub = originals_pb2_grpc.OriginalsStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Requantize(_rows(page, bytes.fromhex(told["codec"])))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "PutCodec" in (caught.value.details() or "")


def _rows(page: bytes, codec: bytes) -> originals_pb2.RequantizeRequest:
    """A request of one row."""
    one = {"layer": np.int16, "head": np.int16, "side": np.uint8}
    request = RowRequest(
        shape=SHAPE,
        page_ids={0: page},
        position=np.zeros(1, np.int32),
        have=np.array([WIDTHS[0]], np.uint8),
        want=np.array([WIDTHS[-1]], np.uint8),
        meta=np.ones((1, 4), np.float16).view(np.uint8)[:, :4],
        **{name: np.zeros(1, kind) for name, kind in one.items()},
    )
    return wire.row_request_message(request, codec)
