"""A small Redis under real processes: pages give way, and when another program fills it everything comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import grpc
import pytest
from qaq.v1 import common_pb2, generate_pb2, originals_pb2, originals_pb2_grpc
from redis.asyncio import Redis

from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.redis import connect
from services.common.registry import TTL_S
from tests.faults.conftest import PAGE_TOKENS, Processes
from tests.faults.test_processes import Heard, Stub, listen, opened
from tests.services.junk import filled, refused

BALANCED = common_pb2.CacheParams(preset="balanced")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Over a Redis of 32 MB, of which 16 are for pages: 340 tokens of SmolLM2."""
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(EmbeddedRedis(maxmemory="32mb"))
        made = Processes(redis, tmp_path_factory.mktemp("full"))
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


async def turn(
    client: Stub, session: str, prompt: str, new: int, event: Callable[[], Awaitable[None]] | None = None
) -> int:
    """The number of tokens that came; `event` happens when two have."""
    stop = common_pb2.StopParams(max_new_tokens=new, ignore_eos=True)
    request = generate_pb2.GenerateRequest(
        prompt=prompt, session_id=session, sampling=common_pb2.SamplingParams(temperature=0), stop=stop
    )
    heard = Heard()
    await listen(client.Generate(request, timeout=300), heard, 2, event)
    return len(heard.tokens)


async def stats(cache_service: str) -> originals_pb2.StatsReply:
    async with open_channel(cache_service) as channel:
        return await originals_pb2_grpc.OriginalsStub(channel).Stats(originals_pb2.StatsRequest(), timeout=30)


async def test_sessions_that_need_more_pages_than_fit(cache_service: str, client: Stub) -> None:
    """None of them is refused: those that are idle give way to those that run, and go on when it is their turn."""
    sessions = [await opened(client, BALANCED) for _ in range(4)]
    for number, session in enumerate([*sessions, sessions[0]]):
        assert await turn(client, session, f"Chapter {number}. " + "The ferryman rowed on. " * 22, 8) == 8
    figures = await stats(cache_service)
    assert figures.evicted > 0
    assert figures.refused == 0
    assert figures.stored_bytes <= figures.budget_bytes


async def test_another_program_fills_redis(cache_service: str, client: Stub, redis: Redis) -> None:
    """The stream that runs goes on; new sessions are refused; with room everything works, without any restart."""
    session = await opened(client, BALANCED)
    async with contextlib.AsyncExitStack() as stack:

        async def fill() -> None:
            await stack.enter_async_context(filled(redis))

        assert await turn(client, session, "The ferryman rowed on. " * 8, 40, fill) == 40
        error = await refused(lambda: opened(client))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata() or ())["retry-after-ms"]
        await asyncio.sleep(TTL_S + 2)
        assert (await client.GetModel(generate_pb2.GetModelRequest())).workers == 1
    for each in (session, await opened(client)):
        assert await turn(client, each, " Then the ferryman", 4) == 4
    while not (await stats(cache_service)).pages:  # noqa: ASYNC110 (nobody tells when the waiting pages have arrived)
        await asyncio.sleep(0.1)
