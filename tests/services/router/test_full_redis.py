"""A Redis that another program has filled: who runs goes on, who comes is told, and everything works again later."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from qaq.v1 import generate_pb2
from redis.asyncio import Redis

from services.common import registry
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import RouterSettings
from services.router import hold, sessions, workers
from services.router.sessions import SessionDirectory
from tests.services.junk import filled, refused

from .conftest import CountingWorker, router_channel, running_router, running_worker
from .test_service import Stub, replies, request, until

Code = grpc.StatusCode
OPEN = generate_pb2.OpenSessionRequest(cache={"preset": "fp16"})


@pytest.fixture
def maxmemory() -> str:
    return "8mb"


@pytest.fixture(autouse=True)
def expiring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members and holds expire soon."""
    for module, name in ((registry, "TTL_S"), (hold, "HOLD_TTL_S"), (sessions, "HOLD_TTL_S")):
        monkeypatch.setattr(module, name, 2)
    for module, name in ((registry, "HEARTBEAT_S"), (hold, "REFRESH_S")):
        monkeypatch.setattr(module, name, 0.1)


async def test_streams_go_on_and_later_calls_succeed(own_settings: RouterSettings, own_redis: Redis) -> None:
    async with running_worker(own_redis) as worker, running_router(own_settings) as client:
        session, idle = [(await client.OpenSession(OPEN)).session_id for _ in range(2)]
        worker.gate.clear()
        kept = await begun(client.Generate(request(new=40, session_id=session), timeout=60))
        alone = await begun(client.Generate(request(new=40), timeout=60))
        async with filled(own_redis):
            for call in (
                lambda: client.OpenSession(OPEN, timeout=30),
                lambda: client.OpenSession(generate_pb2.OpenSessionRequest(branch_of=idle), timeout=30),
                lambda: replies(client.Generate(request(new=1), timeout=30)),
                lambda: replies(client.Generate(request(new=1, session_id=idle), timeout=30)),
            ):
                error = await refused(call)
                assert (error.code(), "Redis is full" in error.details()) == (Code.RESOURCE_EXHAUSTED, True)
                assert dict(error.trailing_metadata())["retry-after-ms"]
            await asyncio.sleep(2.2)  # nobody expires meanwhile
            assert await own_redis.exists(f"qaq:session:{session}:run")
            assert (await client.GetModel(generate_pb2.GetModelRequest())).workers == 1
            worker.gate.set()
            for stream in (kept, alone):
                *_, last = await replies(stream)
                assert last.HasField("finished")
            assert len(await SessionDirectory(own_redis, 600).tokens(session)) == len(worker.asked[0].token_ids) + 40
        assert (await client.OpenSession(OPEN)).session_id
        for asked in (request(session_id=session), request()):
            assert (await replies(client.Generate(asked, timeout=30)))[-1].HasField("finished")


async def test_members_that_are_lost_come_back(own_settings: RouterSettings, own_redis: Redis) -> None:
    """As after a Redis that lost everything, or stood still for longer than members last."""
    async with running_worker(own_redis), running_router(own_settings) as client:
        await replies(client.Generate(request(), timeout=30))
        async with filled(own_redis):
            await own_redis.delete(*[key async for key in own_redis.scan_iter("qaq:member*")])
            await asyncio.sleep(0.5)

        codes: set[grpc.StatusCode] = set()

        async def answered() -> bool:
            try:
                return bool(await replies(client.Generate(request(), timeout=30)))
            except grpc.aio.AioRpcError as error:
                codes.add(error.code())
                return False

        await until(answered, "an answer")
        assert codes <= {Code.UNAVAILABLE}


async def test_a_router_looks_for_workers_after_any_error(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "REFRESH_S", 0.02)
    pool, failures = workers.Workers(registry.Registry(redis)), [ZeroDivisionError("unforeseen")]
    await pool.start()

    def refreshed() -> None:
        if failures:
            raise failures.pop()

    async def ready() -> bool:
        return len(pool.ready) == 1

    pool.refreshed = refreshed
    async with running_worker(redis):
        await until(ready, "a worker")
    assert failures == []
    await pool.stop()


async def test_the_last_tokens_are_written_when_redis_is_back(
    own_server: EmbeddedRedis, own_settings: RouterSettings, own_redis: Redis
) -> None:
    async with running_worker(own_redis) as worker, running_router(own_settings) as client:
        session, stream, count = await half(client, worker)
        own_server.terminate()
        worker.gate.set()
        ending = asyncio.create_task(replies(stream))
        await asyncio.sleep(0.5)
        own_server.start()
        assert (await ending)[-1].HasField("finished")
        assert len(await SessionDirectory(own_redis, 600).tokens(session)) == count


async def test_a_log_that_cannot_be_written_is_said(
    own_server: EmbeddedRedis, own_settings: RouterSettings, own_redis: Redis
) -> None:
    """After every token has come. Who rejoins the session gets the same ones."""
    own_settings = own_settings.model_copy(update={"resume_timeout_s": 0.1})
    async with running_worker(own_redis) as worker, router_channel(own_settings) as channel:
        client = Stub(channel)
        session, stream, count = await half(client, worker)
        tokens: list[int] = []
        own_server.terminate()
        worker.gate.set()

        async def read() -> None:
            async for reply in stream:
                tokens.extend([reply.token.token_id] if reply.HasField("token") else [])

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read()
        assert (caught.value.code(), len(tokens)) == (Code.UNAVAILABLE, 39)
        assert "every token was sent" in (caught.value.details() or "")
        assert dict(caught.value.trailing_metadata())["retry-after-ms"]
        own_server.start()

        async def rejoined() -> bool:
            try:
                rest = await replies(client.Rejoin(generate_pb2.RejoinRequest(session_id=session, received=40)))
            except grpc.aio.AioRpcError:
                return False
            return rest[-1].HasField("finished")

        await until(rejoined, "the rest of the turn")
        log = await SessionDirectory(own_redis, 600).tokens(session)
        assert log[count - 40 : count] == [*range(count - 40, count)]


async def half(client: Stub, worker: CountingWorker) -> tuple[str, Any, int]:
    """A session whose stream has begun, the stream, and the length of the log at its end."""
    session = (await client.OpenSession(OPEN)).session_id
    worker.gate.clear()
    stream = await begun(client.Generate(request(new=40, session_id=session), timeout=60))
    return session, stream, len(worker.asked[-1].token_ids) + 40


async def begun(call: grpc.aio.UnaryStreamCall) -> Any:
    """A stream whose first token was read."""
    stream = aiter(call)
    while not (await anext(stream)).HasField("token"):
        pass
    return stream
