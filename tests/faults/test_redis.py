"""A Redis that loses its data, is full, slow, or has no disk left, while streams run over it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from qaq.v1 import generate_pb2
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.redis import connect
from services.common.settings import RouterSettings
from services.router.server import RouterServer
from tests.faults.conftest import Stack
from tests.faults.hearing import NEW, Stub, hear, opened
from tests.faults.network import Proxy
from tests.faults.processes import Processes, crash


@pytest.fixture
def processes(stack: Stack) -> Processes:
    return stack.processes


@pytest.fixture
async def redis(processes: Processes) -> AsyncIterator[Redis]:
    client = connect(processes.redis.url, retries=0)
    yield client
    await client.aclose()


async def log_length(redis: Redis, session: str) -> int:
    return len(np.frombuffer(await redis.get(f"qaq:session:{session}:tokens") or b"", "<i4"))


async def until_answered(client: Stub) -> None:
    """Waits until a new call is served again."""
    async with asyncio.timeout(300):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await hear(client, await opened(client))
                return
            await asyncio.sleep(0.5)


async def test_streams_outlive_the_loss_of_all_data(processes: Processes, client: Stub, redis: Redis) -> None:
    """Sessions that generate are written down again from what their router knows."""
    expected = await hear(client, await opened(client))
    session = await opened(client)

    async def lose() -> None:
        await asyncio.to_thread(crash, processes.redis, data=False)

    heard = await hear(client, session, at=NEW // 2, event=lose)
    assert (heard.tokens, heard.text) == (expected.tokens, expected.text)
    assert await log_length(redis, session) == heard.usage.prompt_tokens + NEW
    await until_answered(client)
    assert len((await hear(client, session, " Later")).tokens) == NEW


async def test_a_full_redis_stops_no_stream_and_is_left_behind(client: Stub, redis: Redis) -> None:
    session, filled = await opened(client), asyncio.Event()

    async def fill() -> None:
        await redis.config_set("maxmemory", "1mb")
        filled.set()

    stream = asyncio.create_task(hear(client, session, at=NEW // 4, event=fill))
    await filled.wait()
    with pytest.raises(RedisError, match="maxmemory"):
        await redis.set("anything", 1)
    try:
        heard = await stream
        assert await log_length(redis, session) == heard.usage.prompt_tokens + NEW  # what runs is written all the same
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await opened(client)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        await redis.config_set("maxmemory", "0")
    await until_answered(client)


async def test_a_full_disk_stops_no_stream_and_is_left_behind(disk: Path, client: Stub, redis: Redis) -> None:
    if not await asyncio.to_thread(disk.is_mount):
        pytest.skip("no small disk can be mounted here")
    session, filler, filled = await opened(client), disk / "filler", asyncio.Event()

    async def fill() -> None:
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(1 << 16))
        with contextlib.suppress(RedisError):
            while True:
                await redis.set("anything", bytes(1 << 16))
        filled.set()

    stream = asyncio.create_task(hear(client, session, at=NEW // 4, event=fill))
    await filled.wait()
    await asyncio.wait([stream], timeout=5)
    assert not stream.done()
    filler.unlink()
    heard = await stream
    assert await log_length(redis, session) == heard.usage.prompt_tokens + NEW
    await until_answered(client)


async def test_a_slow_redis_slows_no_stream_down(processes: Processes) -> None:
    """Between router and Redis: a token does not wait for it."""
    head, _, at = processes.redis.url.rpartition("@")
    with Proxy(at.partition("/")[0]) as proxy:
        settings = RouterSettings(redis_url=f"{head}@{proxy.address}/0", port=0, model=processes.model)
        router = RouterServer(settings)
        address = await router.start()
        async with grpc.aio.insecure_channel(address) as channel:
            client = Stub(channel)
            session, expected = await opened(client), await hear(client, await opened(client))
            proxy.delay_s = 0.5
            heard = await hear(client, session)
            proxy.delay_s = 0.0
            assert heard.tokens == expected.tokens
            listed = (await client.ListSessions(generate_pb2.ListSessionsRequest())).sessions
            assert not any(info.running for info in listed)
        await router.stop()
