"""A small Redis under real processes: pages give way, and when another program fills it everything comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from qaq.v1 import common_pb2, generate_pb2, originals_pb2, originals_pb2_grpc
from redis.asyncio import Redis

from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.redis import connect
from services.common.registry import TTL_S
from tests.faults.conftest import PAGE_TOKENS, Processes
from tests.faults.test_processes import EXACT, Heard, Stub, asked, hear, listen, opened
from tests.services.junk import filled

BALANCED = common_pb2.CacheParams(preset="balanced")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Over a Redis of 64 MB, of which 48 are for pages: 1,000 tokens of SmolLM2."""
    with contextlib.ExitStack() as stack:
        made = Processes(stack.enter_context(EmbeddedRedis(maxmemory="64mb")), tmp_path_factory.mktemp("full"))
        stack.callback(made.stop)
        yield made


@pytest.fixture(scope="module")
def cache_service(processes: Processes) -> str:
    """One cache service, and one worker."""
    worker = processes.start("worker", QAQ_PAGE_TOKENS=str(PAGE_TOKENS))
    address = processes.start("originals")
    processes.until_serving(address, worker)
    return address


@pytest.fixture
async def redis(processes: Processes) -> AsyncIterator[Redis]:
    redis = connect(processes.redis.url)
    yield redis
    await redis.aclose()


async def stats(cache_service: str) -> originals_pb2.StatsReply:
    async with open_channel(cache_service) as channel:
        return await originals_pb2_grpc.OriginalsStub(channel).Stats(originals_pb2.StatsRequest(), timeout=10)


async def test_sessions_that_need_more_pages_than_fit(cache_service: str, client: Stub) -> None:
    """None of them is refused: those that are idle give way to those that run."""
    sessions = [await opened(client, BALANCED) for _ in range(6)]
    for turn in range(2):
        for number, session in enumerate(sessions):
            heard = await hear(client, session, f"Chapter {number}, part {turn}. " + "The ferryman rowed on. " * 20)
            assert heard.usage.generated_tokens == 64
    figures = await stats(cache_service)
    assert figures.evicted > 0
    assert figures.refused == 0
    assert figures.stored_bytes <= figures.budget_bytes


async def test_another_program_fills_redis(cache_service: str, client: Stub, redis: Redis) -> None:
    """The stream that runs goes on; new sessions are refused; with room everything works, without any restart."""
    session, heard = await opened(client, BALANCED), Heard()
    async with contextlib.AsyncExitStack() as stack:
        full = filled(redis)
        await listen(client.Generate(asked(session), timeout=300), heard, 8, lambda: stack.enter_async_context(full))
        assert len(heard.tokens) == 64
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            while True:  # a full Redis has a little room again and again
                await opened(client)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(refused.value.trailing_metadata() or ())["retry-after-ms"]
        await asyncio.sleep(TTL_S + 2)
        assert (await client.GetModel(generate_pb2.GetModelRequest())).workers == 1
    assert len((await hear(client, session, " Then the ferryman")).tokens) == 64
    assert len((await hear(client, await opened(client, EXACT))).tokens) == 64
    while not (await stats(cache_service)).pages:  # noqa: ASYNC110 (nobody tells when the waiting pages have arrived)
        await asyncio.sleep(0.1)
