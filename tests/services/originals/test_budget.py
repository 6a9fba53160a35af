"""The byte budget of pages: what goes, what stays, who is refused, and that sessions and members have room."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest
from pydantic import SecretStr
from qaq.v1 import common_pb2, originals_pb2_grpc
from qaq.v1 import originals_pb2 as pb
from redis.asyncio import Redis

from qaq_core.base.pages import Page, PageShape
from qaq_core.quantization.quantizer import Quantizer
from services.common import metrics
from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.errors import InvalidArgument, ResourceExhausted
from services.common.redis import connect
from services.common.registry import Registry
from services.common.settings import OriginalsSettings
from services.originals import budget as module
from services.originals import held, wire
from services.originals.budget import Budget, Keeper, reserve
from services.originals.client import RemoteOriginals
from services.originals.index import PageIndex
from services.originals.page_format import stored_bytes
from services.originals.server import OriginalsServer
from services.originals.store import PageStore
from services.router.sessions import SessionDirectory
from tests.services.metric import value
from tests.services.originals.conftest import SHAPE, make_pages, seal, status

MIB = 1 << 20
LARGE = PageShape(layers=16, kv_heads=4, tokens=32, head_dim=64)  # 1 MiB
WRITTEN = int(os.environ.get("QAQ_BUDGET_MIB", 256)) * MIB


def within(pages: int) -> Budget:
    """A budget with room for so many pages of SHAPE, and not for one more."""
    each = stored_bytes(SHAPE) + 1100  # less or more by some 300: allocators round differently
    return Budget(int((pages + 0.5) * each))


async def put(store: PageStore, pages: list[Page], holder: str = "") -> None:
    for page in pages:
        await store.put(page.id, page.shape, seal(page), page.to_bytes(), holder)


async def stored(store: PageStore, pages: list[Page]) -> list[bool]:
    return [await store.match([page.id]) == 1 for page in pages]


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    while not await holds():  # noqa: ASYNC110 (Redis tells nobody)
        await asyncio.sleep(0.02)


def test_what_is_kept_for_others() -> None:
    assert [reserve(size * MIB) // MIB for size in (4, 64, 256, 4096)] == [2, 16, 32, 512]


def test_the_budget_follows_redis() -> None:
    budget = Budget()
    assert budget.nbytes is None
    budget.follow(0, 100 * MIB, 0)
    assert budget.nbytes is None
    budget.follow(64 * MIB, 50 * MIB, 45 * MIB)
    assert budget.nbytes == budget.whole == 48 * MIB
    budget.follow(64 * MIB, 50 * MIB, 20 * MIB)  # others need 30 MiB
    assert (budget.nbytes, budget.whole) == (26 * MIB, 48 * MIB)
    budget.follow(64 * MIB, 64 * MIB, 0)
    assert budget.nbytes == 0
    chosen = Budget(10 * MIB)
    for maxmemory, expected in ((0, 10), (64 * MIB, 10), (8 * MIB, 4)):
        chosen.follow(maxmemory, 2 * MIB, 1 * MIB)
        assert chosen.nbytes == expected * MIB


async def test_pages_that_nobody_holds_go_before_anything_is_refused(redis: Redis) -> None:
    store = PageStore(redis, 600, form="plain", budget=within(4))
    free, held_ones, new = make_pages(3), make_pages(1, seed=1), make_pages(3, seed=2)
    await put(store, free)
    await put(store, held_ones, "aa")
    await store.touch([free[0].id])
    before = value(metrics.pages_evicted)
    await put(store, new[:2], "bb")
    assert await stored(store, free) == [True, False, False]  # the one that was used last is left
    assert await stored(store, held_ones + new[:2]) == [True] * 3
    assert store.evicted == value(metrics.pages_evicted) - before == 2


async def test_pages_that_are_held_are_never_dropped_for_others(redis: Redis) -> None:
    store = PageStore(redis, 600, form="plain", budget=within(3))
    pages, more = make_pages(3), make_pages(1, seed=1)
    await put(store, pages, "aa")
    before = value(metrics.pages_refused)
    with pytest.raises(ResourceExhausted, match="running sessions hold all pages") as refused:
        await put(store, more, "bb")
    assert refused.value.retry_after_ms
    assert store.refused == value(metrics.pages_refused) - before == 1
    assert await stored(store, pages + more) == [True, True, True, False]
    await put(store, pages, "bb")  # what is known needs no room
    await store.release([page.id for page in pages], "aa")
    with pytest.raises(ResourceExhausted):
        await put(store, more, "bb")
    await store.release([pages[2].id], "bb")
    await put(store, more, "bb")
    assert await stored(store, pages + more) == [True, True, False, True]


async def test_a_page_that_can_never_fit_says_so(redis: Redis) -> None:
    store = PageStore(redis, 600, budget=Budget(2000))
    with pytest.raises(InvalidArgument, match="QAQ_PAGE_BUDGET_BYTES"):
        await put(store, make_pages(1))


async def test_codecs_are_bytes_of_the_budget_too(redis: Redis) -> None:
    """They go like pages that nobody holds; the worker puts one again when it is needed."""
    store = PageStore(redis, 600, form="plain", budget=within(3))
    for number in range(20):
        await store.put_codec(bytes([number]) * 16, bytes(3000))
    pages = make_pages(2)
    await put(store, pages, "aa")
    assert await stored(store, pages) == [True, True]
    assert await store.get_codec(bytes(16)) is None
    assert await store.get_codec(bytes([19]) * 16) is not None
    await put(store, make_pages(1, seed=1), "aa")
    with pytest.raises(ResourceExhausted):
        await store.put_codec(bytes(16), bytes(3000))


async def test_a_corrupt_page_leaves_the_sum(redis: Redis) -> None:
    store = PageStore(redis, 600)
    (page,) = make_pages(1)
    await put(store, [page])
    await redis.setrange(f"qaq:page:{page.id.hex()}", 100, b"junk")
    assert await store.get(page.id) is None
    assert await store.stored_bytes() == 0


async def test_the_keeper_makes_room_for_what_else_grows() -> None:
    with EmbeddedRedis(maxmemory="64mb") as server:
        client = connect(server.url)
        budget, index = Budget(), PageIndex(client, 600)
        keeper = Keeper(client, index, budget)
        await keeper.step()
        store = PageStore(client, 600, form="plain", budget=budget)
        held_ones, free = make_pages(10, LARGE), make_pages(24, LARGE, seed=1)
        await put(store, held_ones, "aa")
        await put(store, free)
        assert await stored(store, free) == [True] * 24
        number = 0
        while (memory := await client.info("memory"))["used_memory"] < 62 * MIB:
            await client.set(f"other:{number}", bytes(MIB))
            number += 1
        await keeper.step()
        memory = await client.info("memory")
        assert memory["used_memory"] <= memory["maxmemory"] - reserve(64 * MIB) // 2
        assert await stored(store, held_ones) == [True] * 10
        assert True in await stored(store, free)
        assert value(metrics.page_bytes) == await index.nbytes()
        assert value(metrics.page_budget_bytes) == budget.nbytes
        assert budget.nbytes is not None
        assert budget.whole is not None
        assert budget.nbytes < budget.whole
        await client.aclose()


@contextlib.asynccontextmanager
async def serving(url: str, **settings: int) -> AsyncIterator[str]:
    server = OriginalsServer(OriginalsSettings(redis_url=SecretStr(url), page_form="plain", **settings))
    try:
        yield await server.start()
    finally:
        await server.stop()


async def chunks(*pages: Page, holder: str = "") -> AsyncIterator[pb.PutRequest]:
    for page in pages:
        for piece in wire.page_chunks(page.id, page.shape, seal(page), page.to_bytes()):
            yield pb.PutRequest(chunk=piece, holder=holder)


async def test_refusals_and_figures_over_the_wire(redis: Redis, redis_server: EmbeddedRedis) -> None:
    pages = make_pages(5)
    budget = within(3).nbytes
    assert budget is not None
    async with serving(redis_server.url, page_budget_bytes=budget) as address, open_channel(address) as channel:
        stub = originals_pb2_grpc.OriginalsStub(channel)
        await stub.Put(chunks(*pages[:3], holder="aa"), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Put(chunks(pages[3], holder="aa"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata())["retry-after-ms"]
        await stub.Release(pb.ReleaseRequest(page_ids=[pages[2].id], holder="aa"), timeout=10)
        await stub.Put(chunks(pages[3], holder="aa"), timeout=10)
        stats = await stub.Stats(pb.StatsRequest(), timeout=10)
        assert (stats.pages, stats.evicted, stats.refused, stats.budget_bytes) == (3, 1, 1, budget)
        assert stats.bytes < stats.stored_bytes <= budget
        request = pb.FetchRequest(page_ids=[page.id for page in pages[:2]], holder="bb")
        assert [reply.chunk.last async for reply in stub.Fetch(request, timeout=10)] == [True, True]
        await stub.Release(pb.ReleaseRequest(page_ids=[page.id for page in pages[:4]], holder="aa"), timeout=10)
        await stub.Put(chunks(pages[4]), timeout=10)
        assert (await stub.Match(pb.MatchRequest(page_ids=[p.id for p in pages[:2]]), timeout=10)).pages == 2  # by bb
        code, message = await status(stub.Touch(pb.TouchRequest(page_ids=[], holder="a b"), timeout=10))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "letters and digits" in message


async def test_workers_hold_what_they_run_and_wait_for_room(
    redis: Redis, redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers: what one holds is refused to the other, which has it stored as soon as the first is done."""
    monkeypatch.setattr(held, "TELL_AFTER_S", 0.01)
    first, second = make_pages(3), make_pages(3, seed=1)
    async with serving(redis_server.url, page_budget_bytes=within(4).nbytes or 0) as address:
        one, other = RemoteOriginals.at([address]), RemoteOriginals.at([address])
        await asyncio.wrap_future(one.put(first))
        one.hold([page.id for page in first])  # a second sequence
        waiting = asyncio.wrap_future(other.put(second))
        retries = value(metrics.put_retries)
        while value(metrics.put_retries) < retries + 4:  # noqa: ASYNC110 (its loop is another thread's)
            await asyncio.sleep(0.02)
        one.forget([page.id for page in first])
        assert await asyncio.wrap_future(one.match([page.id for page in first])) == 3
        assert not waiting.done()
        one.rest([page.id for page in first])
        await asyncio.wait_for(waiting, 30)
        one.wake([page.id for page in first])
        assert other.pending_bytes == 0
        assert await asyncio.wrap_future(other.match([page.id for page in second])) == 3
        # The session was closed before its pages arrived: nobody holds them then.
        late = make_pages(1, seed=2)
        other.forget([page.id for page in second])
        put_late = asyncio.wrap_future(other.put(late))
        other.forget([page.id for page in late])
        await asyncio.wait_for(put_late, 30)
        index = PageIndex(redis, 600)

        async def all_dropped() -> bool:
            await index.evict(0)
            return not await redis.exists(f"qaq:page:{late[0].id.hex()}")

        await asyncio.wait_for(until(all_dropped), 30)
        await asyncio.to_thread(one.close)
        await asyncio.to_thread(other.close)


@pytest.mark.slow
async def test_many_pages_through_64_mb(quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused that needs no page, no member is lost, and what a running session holds survives."""
    monkeypatch.setattr(module, "FOLLOW_EVERY_S", 0.2)
    with EmbeddedRedis(maxmemory="64mb") as server:
        client = connect(server.url)
        registry, sessions = Registry(client), SessionDirectory(client, 600)
        done = asyncio.Event()

        async def control() -> int:
            """What routers and workers do all the time."""
            turns = 0
            while not done.is_set():
                session = await sessions.open("m", common_pb2.CacheParams(), kept=True)
                async with sessions.held(session.id, lambda _: None) as hold:
                    assert await hold.write(0, range(1000))
                await sessions.close(session.id)
                assert [member.address for member in await registry.members("worker")] == ["w:1"]
                assert len(await registry.members("originals")) == 2
                turns += 1
                await asyncio.sleep(0.02)
            return turns

        async with (
            registry.announce("worker", "w:1", {}),
            serving(server.url) as one,
            serving(server.url) as other,
        ):
            controlling = asyncio.create_task(control())
            # 3 MiB that a session holds, under a load of sessions of 8 MiB each that come and go.
            keeper, load = RemoteOriginals.at([one, other]), RemoteOriginals.at([one, other])
            kept, data = make_pages(3, LARGE), make_pages(8, LARGE, seed=1)
            await asyncio.wrap_future(keeper.put(kept))
            for number in range(WRITTEN // (8 * MIB)):
                pages = [Page(number.to_bytes(16) + page.id[:16], page.shape, page.data) for page in data]
                await asyncio.wait_for(asyncio.wrap_future(load.put(pages)), 60)
                load.forget([page.id for page in pages])
            done.set()
            assert await controlling > 10
            assert await asyncio.wrap_future(keeper.match([page.id for page in kept])) == 3
            memory = await client.info("memory")
            assert memory["used_memory_peak"] < memory["maxmemory"]
            await asyncio.to_thread(load.close)
            await asyncio.to_thread(keeper.close)
        await client.aclose()
