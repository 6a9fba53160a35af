"""A router whose Redis goes away, comes back, or comes back empty, while it streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
from qaq.v1 import generate_pb2, generate_pb2_grpc
from redis.asyncio import Redis

from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import RouterSettings
from services.router import hold

from .conftest import CountingWorker, running_router, running_worker
from .test_generation import mortal
from .test_service import replies, request, until

Stub = generate_pb2_grpc.InferenceStub
NEW = 6


async def begun(client: Stub, session: str = "") -> grpc.aio.UnaryStreamCall:
    """A stream whose first token has come."""
    call = client.Generate(request(new=NEW, session_id=session))
    while (await call.read()).WhichOneof("event") != "token":
        pass
    return call


async def rest(call: grpc.aio.UnaryStreamCall) -> list[generate_pb2.GenerateReply]:
    """What comes after the first token."""
    got = []
    while (reply := await call.read()) is not grpc.aio.EOF:
        got.append(reply)
    return got


async def opened(client: Stub) -> str:
    return (await client.OpenSession(generate_pb2.OpenSessionRequest())).session_id


async def log_of(own_redis: Redis, session: str) -> list[int]:
    return np.frombuffer(await own_redis.get(f"qaq:session:{session}:tokens") or b"", "<i4").tolist()


@contextlib.asynccontextmanager
async def waiting(own_redis: Redis, own_settings: RouterSettings) -> AsyncIterator[tuple[CountingWorker, Stub]]:
    """A worker that stops after the first token, and a router."""
    async with running_worker(own_redis) as worker, running_router(own_settings) as client:
        worker.gate.clear()
        yield worker, client


async def test_the_end_of_a_stream_waits_for_redis(
    own_server: EmbeddedRedis, own_redis: Redis, own_settings: RouterSettings
) -> None:
    async with waiting(own_redis, own_settings) as (worker, client):
        session = await opened(client)
        call = await begun(client, session)
        own_server.terminate()
        worker.gate.set()
        for index in range(1, NEW):
            assert (await call.read()).token.index == index
        end = asyncio.create_task(call.read())
        await asyncio.wait([end], timeout=1.0)
        assert not end.done(), "a next turn would not see the last tokens"
        own_server.start()
        assert (await end).HasField("finished")
        n = len(worker.asked[0].token_ids)
        assert await log_of(own_redis, session) == [*worker.asked[0].token_ids, *range(n, n + NEW)]


async def test_the_end_of_a_call_without_a_session_does_not_wait(
    own_server: EmbeddedRedis, own_redis: Redis, own_settings: RouterSettings
) -> None:
    """Nobody will read its log."""
    async with waiting(own_redis, own_settings) as (worker, client):
        call = await begun(client)
        own_server.terminate()
        worker.gate.set()
        got = await rest(call)
        assert [reply.WhichOneof("event") for reply in got] == ["token"] * (NEW - 1) + ["finished"]
        own_server.start()


async def test_without_redis_the_end_comes_with_a_hint(
    own_server: EmbeddedRedis, own_redis: Redis, own_settings: RouterSettings
) -> None:
    impatient = own_settings.model_copy(update={"resume_timeout_s": 0.1})
    async with waiting(own_redis, impatient) as (worker, client):
        call = await begun(client, await opened(client))
        own_server.terminate()
        worker.gate.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest(call)
        own_server.start()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "every token was sent" in caught.value.details()
    assert int(dict(caught.value.trailing_metadata())["retry-after-ms"]) > 0


async def test_a_worker_may_go_away_while_redis_is_away(
    own_server: EmbeddedRedis, own_redis: Redis, own_settings: RouterSettings
) -> None:
    async with mortal(own_redis, 2) as one, mortal(own_redis, 2) as other, running_router(own_settings) as client:
        call = await begun(client, await opened(client))
        own_server.terminate()
        tokens = [(await call.read()).token.index for _ in range(1, NEW)]
        assert tokens == list(range(1, NEW))
        assert len(one.asked + other.asked) > 1
        own_server.start()
        assert (await call.read()).HasField("finished")


@pytest.mark.parametrize("kept", [True, False])
async def test_a_session_that_redis_lost_is_written_down_again(
    own_server: EmbeddedRedis,
    own_redis: Redis,
    own_settings: RouterSettings,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hold, "REFRESH_S", 0.05)
    async with waiting(own_redis, own_settings) as (worker, client):
        session = await opened(client) if kept else ""
        if kept:
            worker.gate.set()
            await replies(client.Generate(request("Before", new=2, session_id=session)))
            worker.gate.clear()
        call = await begun(client, session)
        await own_redis.flushall()
        worker.gate.set()
        got = await rest(call)
        assert [reply.WhichOneof("event") for reply in got] == ["token"] * (NEW - 1) + ["finished"]
        left = sorted([key.decode() async for key in own_redis.scan_iter("qaq:session*")])
        if not kept:
            assert all([0 < await own_redis.ttl(key) <= hold.LEFT_TTL_S for key in left])
            return
        assert left == [f"qaq:session:{session}", f"qaq:session:{session}:tokens", "qaq:sessions", "qaq:sessions:"]
        n = len(worker.asked[-1].token_ids)
        assert await log_of(own_redis, session) == [*worker.asked[-1].token_ids, *range(n, n + NEW)]

        async def answered() -> bool:
            """Once the worker's next heartbeat has registered it again."""
            with contextlib.suppress(grpc.aio.AioRpcError):
                return bool(await replies(client.Generate(request(" after", new=1, session_id=session))))
            return False

        await until(answered, "the session goes on")
        assert worker.asked[-1].history_tokens == n + NEW


async def test_a_session_that_a_client_closed_stays_closed(
    own_redis: Redis, own_settings: RouterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold, "REFRESH_S", 0.02)
    async with waiting(own_redis, own_settings) as (_, client), running_router(own_settings) as other:
        session = await opened(client)
        call = await begun(client, session)
        await other.CloseSession(generate_pb2.CloseSessionRequest(session_id=session))
        with pytest.raises(grpc.aio.AioRpcError, match="was closed while it generated"):
            await rest(call)
        assert [key async for key in own_redis.scan_iter("qaq:session*")] == [f"qaq:session:{session}:closed".encode()]


async def test_a_client_that_rejoins_takes_the_session_at_once(
    own_redis: Redis, own_settings: RouterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its router lives, and only the connection is lost; on the other router, and on the same one."""
    monkeypatch.setattr(hold, "REFRESH_S", 0.05)
    async with waiting(own_redis, own_settings) as (worker, client), running_router(own_settings) as other:
        for router in (other, client):
            session = await opened(client)
            worker.gate.clear()
            first = await begun(client, session)
            again = router.Rejoin(generate_pb2.RejoinRequest(session_id=session, received=1))
            with pytest.raises(grpc.aio.AioRpcError, match="another call, which has taken it"):
                await rest(first)
            worker.gate.set()
            assert (await rest(again))[-1].HasField("finished")
        assert worker.cancelled == []  # the generation goes on
