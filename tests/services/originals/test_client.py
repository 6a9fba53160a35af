"""RemoteOriginals against real services: the same answers as in process, whatever comes and goes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import pytest
import torch
from pydantic import SecretStr
from redis.asyncio import Redis

from qaq_core.base.errors import OriginalsError
from qaq_core.base.rows import RowReply, RowRequest
from qaq_core.quantization.codecs import UniformCodec
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform
from qaq_core.storage.originals import InProcessOriginals
from services.common import metrics
from services.common.embedded_redis import EmbeddedRedis, free_port
from services.common.settings import OriginalsSettings
from services.originals import batches, held, quantizers, replicas
from services.originals.client import RemoteOriginals
from services.originals.server import OriginalsServer
from tests.core.rows import rotated
from tests.services.metric import value
from tests.services.originals.conftest import SHAPE, getranges, make_pages, make_request

T = TypeVar("T")


async def wait(future: Future[T]) -> T:
    return await asyncio.wait_for(asyncio.wrap_future(future), 30)


def local(pages: list, request: RowRequest, quantizer: Quantizer) -> RowReply:
    """What the worker itself would have made."""
    store = InProcessOriginals()
    store.put(pages)
    return store.requantize(request, quantizer).result()


def same(one: RowReply, other: RowReply) -> bool:
    return np.array_equal(one.found, other.found) and np.array_equal(one.planes, other.planes)


def serve(redis_server: EmbeddedRedis, port: int = 0) -> OriginalsServer:
    return OriginalsServer(OriginalsSettings(redis_url=SecretStr(redis_server.url), port=port))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
async def test_pages_come_back(remote: RemoteOriginals, dtype: str) -> None:
    shape = dataclasses.replace(SHAPE, dtype=dtype)
    pages = make_pages(4, shape)
    ids = [page.id for page in pages]
    await wait(remote.put(pages[:3]))
    assert await wait(remote.match(ids)) == 3
    fetched = await wait(remote.fetch(ids, shape))
    assert fetched[3] is None
    for page, other in zip(pages[:3], fetched[:3], strict=True):
        assert other is not None
        assert (other.id, other.shape) == (page.id, page.shape)
        assert torch.equal(other.data, page.data)
    with pytest.raises(OriginalsError, match="page_tokens"):
        await wait(remote.fetch(ids, dataclasses.replace(shape, tokens=8)))
    assert await wait(remote.fetch([], shape)) == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("frame", ["rotated", "plain"])
async def test_rows_are_bit_identical_to_the_workers_own(
    remote: RemoteOriginals, redis: Redis, quantizer: Quantizer, dtype: str, frame: str
) -> None:
    used = quantizer if frame == "rotated" else Quantizer(IdentityTransform(), UniformCodec())
    pages = make_pages(4, dataclasses.replace(SHAPE, dtype=dtype))
    await wait(remote.put(pages[:3]))
    request = make_request(pages, 300, used.meta_bytes)
    before = await getranges(redis)
    reply = await wait(remote.requantize(request, used))
    assert same(reply, local(pages[:3], request, used))
    assert reply.found.tolist() == (request.page < 3).tolist()
    assert len(reply.planes) == request.payload_bytes()[reply.found].sum() > 0
    assert await getranges(redis) > before + 3  # of rows, behind those of headers


async def test_the_quantizer_of_a_sequence_is_sent_after_its_base(
    remote: RemoteOriginals, redis: Redis, quantizer: Quantizer
) -> None:
    pages = make_pages(2)
    await wait(remote.put(pages))
    request = make_request(pages, 50, quantizer.meta_bytes)
    for seed in range(2):
        tokens = torch.randn(
            SHAPE.layers, 2, SHAPE.kv_heads, 90, SHAPE.head_dim, generator=torch.Generator().manual_seed(seed)
        )
        own = quantizer.centered_on(tokens + 2, 0)
        assert same(await wait(remote.requantize(request, own)), local(pages, request, own))
        assert not same(local(pages, request, own), local(pages, request, quantizer))
        assert await redis.exists(*(f"qaq:codec:{one.id.hex()}" for one in (own, quantizer))) == 2


async def test_more_quantizers_of_sequences_than_the_service_keeps(
    remote: RemoteOriginals, quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service reads those that it dropped from Redis again; they have rotations too."""
    monkeypatch.setattr(quantizers, "_OF_SEQUENCES_BYTES", 1)
    pages = make_pages(2)
    await wait(remote.put(pages))
    request = make_request(pages, 50, quantizer.meta_bytes)
    own = [rotated(quantizer, seed) for seed in (1, 2)]
    for one in (*own, *own):
        assert same(await wait(remote.requantize(request, one)), local(pages, request, one))


async def test_the_answer_depends_on_what_redis_holds(
    remote: RemoteOriginals, redis: Redis, quantizer: Quantizer
) -> None:
    pages = make_pages(1)
    await wait(remote.put(pages))
    request = dataclasses.replace(
        make_request(pages, 40, 1), want=np.full(40, 16, np.uint8), have=np.zeros(40, np.uint8)
    )
    first = (await wait(remote.requantize(request, quantizer))).planes.reshape(40, -1)
    # One stored original changes its sign: the rows made of it change, and no others.
    layer, side, head, token = (int(getattr(request, name)[0]) for name in ("layer", "side", "head", "token"))
    pages[0].data[layer, side, head, token] *= -1
    await redis.flushdb()
    await wait(remote.put(pages))
    second = (await wait(remote.requantize(request, quantizer))).planes.reshape(40, -1)
    changed = (first != second).any(1)
    flipped = (request.layer == layer) & (request.side == side) & (request.head == head) & (request.token == token)
    assert changed.tolist() == flipped.tolist()


async def test_an_empty_batch_and_missing_pages(remote: RemoteOriginals, quantizer: Quantizer) -> None:
    pages = make_pages(2)
    request = make_request(pages, 10, 1)
    reply = await wait(remote.requantize(request, quantizer))
    assert not reply.found.any()
    assert len(reply.planes) == 0
    reply = await wait(remote.requantize(request.select(np.zeros(0, dtype=int)), quantizer))
    assert len(reply.found) == len(reply.planes) == 0


async def test_large_batches_are_cut_and_shared_among_replicas(
    redis: Redis, redis_server: EmbeddedRedis, quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_ROWS", 37)
    servers = [serve(redis_server) for _ in range(3)]
    remote = RemoteOriginals.at([await server.start() for server in servers])
    try:
        pages = make_pages(20)
        await wait(remote.put(pages))
        request = make_request(pages, 500, 1)
        assert same(await wait(remote.requantize(request, quantizer)), local(pages, request, quantizer))
    finally:
        remote.close()
        for server in servers:
            await server.stop()


@pytest.mark.parametrize("seed", range(5))
def test_cut_and_merged_is_the_whole(quantizer: Quantizer, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_REPLY_BYTES", 400)
    pages = make_pages(7, seed=seed)
    request = make_request(pages, 200, 1, seed)
    parts = batches.split(request, lambda page_id: replicas.choose(page_id, ["a:1", "b:2", "c:3"]))
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    assert all(request.payload_bytes()[part].sum() <= 400 for part in parts)
    replies = [local(pages[:5], request.select(part), quantizer) for part in parts]
    assert same(batches.merge(request, parts, replies), local(pages[:5], request, quantizer))
    replies[0] = RowReply(replies[0].found, replies[0].planes[:-1])
    with pytest.raises(OriginalsError, match="wrong size"):
        batches.merge(request, parts, replies)


def test_when_a_replica_goes_only_its_pages_move() -> None:
    ids = [page.id for page in make_pages(200)]
    three, two = ["a:1", "b:2", "c:3"], ["a:1", "c:3"]
    before = {page_id: replicas.choose(page_id, three) for page_id in ids}
    assert set(before.values()) == set(three)
    for page_id in ids:
        if before[page_id] != "b:2":
            assert replicas.choose(page_id, two) == before[page_id]


async def test_a_put_waits_for_a_service_to_come(redis: Redis, redis_server: EmbeddedRedis) -> None:
    port = free_port()
    remote = RemoteOriginals.at([f"127.0.0.1:{port}"])
    server = serve(redis_server, port)
    try:
        retries = value(metrics.put_retries)
        pages = make_pages(6)
        acknowledged = remote.put(pages)
        await until(lambda: value(metrics.put_retries) > retries)
        assert not acknowledged.done()
        assert value(metrics.pages_unacked) == 6
        with pytest.raises(OriginalsError, match="UNAVAILABLE"):
            await wait(remote.match([pages[0].id]))
        await server.start()
        await wait(acknowledged)
        assert value(metrics.pages_unacked) == 0
        assert await wait(remote.match([page.id for page in pages])) == 6
    finally:
        remote.close()
        await server.stop()


async def test_services_that_come_and_go_are_noticed(
    redis: Redis, redis_server: EmbeddedRedis, quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "REFRESH_S", 0.0)
    remote = RemoteOriginals.registered(redis_server.url)
    first, second = serve(redis_server), serve(redis_server)
    pages = make_pages(4)
    request = make_request(pages, 60, 1)
    try:
        with pytest.raises(OriginalsError, match="no cache service is registered"):
            await wait(remote.match([pages[0].id]))
        with pytest.raises(OriginalsError, match="no cache service is registered"):
            await wait(remote.requantize(request, quantizer))
        await first.start()
        await wait(remote.put(pages))
        await second.start()
        await first.stop()
        # The second has never seen the codec; it finds it in Redis.
        assert same(await wait(remote.requantize(request, quantizer)), local(pages, request, quantizer))
        # Redis loses the codec and the pages, and the service is another one: both are put again.
        await redis.flushdb()
        await second.stop()
        second = serve(redis_server)
        await second.start()
        await wait(remote.put(pages))
        assert same(await wait(remote.requantize(request, quantizer)), local(pages, request, quantizer))
    finally:
        remote.close()
        await first.stop()
        await second.stop()


async def test_a_dead_replica_is_passed_over(redis: Redis, redis_server: EmbeddedRedis, quantizer: Quantizer) -> None:
    server = serve(redis_server)
    remote = RemoteOriginals.at([f"127.0.0.1:{free_port()}", await server.start()])
    try:
        pages = make_pages(12)  # some of which belong to the dead one
        await wait(remote.put(pages))
        request = make_request(pages, 60, 1)
        assert same(await wait(remote.requantize(request, quantizer)), local(pages, request, quantizer))
    finally:
        remote.close()
        await server.stop()


async def test_what_is_held_is_touched_until_forgotten(
    address: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "TOUCH_EVERY_S", 0.02)
    remote = RemoteOriginals.at([address])
    kept, forgotten = make_pages(2)
    keys = [f"qaq:page:{page.id.hex()}" for page in (kept, forgotten)]
    try:
        await wait(remote.put([kept, forgotten]))
        await wait(remote.fetch([kept.id], SHAPE))  # a second session holds it
        remote.forget([kept.id, forgotten.id])
        await wait(remote.match([]))  # after what was submitted before
        for key in keys:
            await redis.expire(key, 100)

        async def prolonged() -> bool:
            return await redis.ttl(keys[0]) > 1000

        await until(prolonged)
        assert await redis.ttl(keys[1]) <= 100
    finally:
        remote.close()


async def test_close_says_so_to_everybody(quantizer: Quantizer) -> None:
    remote = RemoteOriginals.at([f"127.0.0.1:{free_port()}"])
    pending = remote.put(make_pages(10))
    await asyncio.to_thread(remote.close)
    for future in (pending, remote.match([bytes(32)])):
        with pytest.raises(OriginalsError, match="closed"):
            await wait(future)


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    """Waits for a condition to hold."""
    for _ in range(1000):
        held = condition()
        if held if isinstance(held, bool) else await held:
            return
        await asyncio.sleep(0.01)
    pytest.fail("the condition never held")
