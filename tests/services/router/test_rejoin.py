"""A client that lost its stream takes it up on another router: it gets the rest, and nothing twice."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
from qaq.v1 import generate_pb2, generate_pb2_grpc
from redis.asyncio import Redis

from services.common.settings import RouterSettings
from services.router.hold import LEFT_TTL_S
from services.router.server import RouterServer

from .conftest import running_router, running_worker
from .test_generation import MortalWorker, mortal
from .test_service import replies, request, until

Stub = generate_pb2_grpc.InferenceStub
Code = grpc.StatusCode
NEW = 9


@pytest.fixture
async def worker(redis: Redis) -> AsyncIterator[MortalWorker]:
    async with mortal(redis) as worker:
        yield worker


@pytest.fixture
async def routers(worker: MortalWorker, router_settings: RouterSettings) -> AsyncIterator[tuple[Stub, Stub]]:
    async with running_router(router_settings) as one, running_router(router_settings) as other:
        yield one, other


async def a_turn(client: Stub, **more: object) -> str:
    """A session with a turn of NEW tokens behind it."""
    session = (await client.OpenSession(generate_pb2.OpenSessionRequest())).session_id
    got = await replies(client.Generate(request(new=NEW, session_id=session, **more)))
    assert len(got) == NEW + 2
    return session


async def rejoined(client: Stub, session: str, received: int) -> list[generate_pb2.GenerateReply]:
    return await replies(client.Rejoin(generate_pb2.RejoinRequest(session_id=session, received=received)))


async def log_of(redis: Redis, session: str) -> list[int]:
    raw = await redis.get(f"qaq:session:{session}:tokens")
    return np.frombuffer(raw, "<i4").tolist()


@pytest.mark.parametrize("received", [0, 4, NEW])
async def test_the_rest_comes_from_another_router(
    routers: tuple[Stub, Stub], worker: MortalWorker, redis: Redis, received: int
) -> None:
    session = await a_turn(routers[0])
    whole = await log_of(redis, session)
    got = await rejoined(routers[1], session, received)
    tokens = [reply.token for reply in got if reply.HasField("token")]
    assert [token.index for token in tokens] == list(range(received, NEW))
    assert [token.token_id for token in tokens] == whole[len(whole) - NEW + received :]
    assert got[-1].HasField("finished")
    assert worker.asked[-1].generated_tokens == received
    assert worker.asked[-1].sampling == worker.asked[0].sampling  # the same seed
    assert await log_of(redis, session) == whole


async def test_what_a_killed_router_had_not_written_is_generated_again(
    routers: tuple[Stub, Stub], worker: MortalWorker, redis: Redis
) -> None:
    """The client has six tokens, the log four; the dead router still holds the session for a moment."""
    session = await a_turn(routers[0])
    whole = await log_of(redis, session)
    await redis.set(f"qaq:session:{session}:tokens", np.asarray(whole[: 4 - NEW], "<i4").tobytes())
    await redis.set(f"qaq:session:{session}:run", "the dead one", px=300)
    got = await rejoined(routers[1], session, 6)
    assert worker.asked[-1].generated_tokens == 4
    assert [reply.token.index for reply in got if reply.HasField("token")] == [6, 7, 8]
    assert await log_of(redis, session) == whole


async def test_a_shorter_rest_leaves_nothing_behind_it(
    routers: tuple[Stub, Stub], worker: MortalWorker, redis: Redis
) -> None:
    """What nobody has received is forgotten first, and with it the names of pages that may hold it."""
    session = await a_turn(routers[0])
    whole = await log_of(redis, session)
    worker.refuse = Code.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError):
        await rejoined(routers[1], session, 2)
    assert await log_of(redis, session) == whole[: 2 - NEW]
    assert await redis.get(f"qaq:session:{session}:pages") is None


async def test_a_later_turn_is_the_one_to_rejoin(routers: tuple[Stub, Stub], worker: MortalWorker) -> None:
    session = await a_turn(routers[0])
    await replies(routers[0].Generate(request(" and then", new=3, session_id=session)))
    got = await rejoined(routers[1], session, 1)
    assert [reply.token.index for reply in got if reply.HasField("token")] == [1, 2]
    assert worker.asked[-1].history_tokens == worker.asked[-2].history_tokens


async def test_a_session_for_one_call_is_left_for_a_minute(routers: tuple[Stub, Stub], redis: Redis) -> None:
    """Its client may be cut off, and have less than its router has sent. Nobody sees it in the meantime."""
    whole = await replies(routers[0].Generate(request(new=NEW)))
    session = whole[0].session_id
    for _ in range(2):
        await until(lambda: _left(redis, session), "it expires")
        assert not (await routers[0].ListSessions(generate_pb2.ListSessionsRequest())).sessions
        got = await rejoined(routers[1], session, 3)
        assert [reply.token for reply in got if reply.HasField("token")] == [reply.token for reply in whole[4:-1]]
        assert got[-1].finished == whole[-1].finished


async def test_a_session_for_one_call_is_forgotten_after_an_error(
    routers: tuple[Stub, Stub], worker: MortalWorker, redis: Redis
) -> None:
    session = await a_turn(routers[0])
    await redis.hset(f"qaq:session:{session}", "kept", "0")
    worker.refuse = Code.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError):
        await rejoined(routers[1], session, 2)
    await until(lambda: _gone(redis, session), "the session is forgotten")


async def test_a_session_for_one_call_begins_with_its_pages(
    routers: tuple[Stub, Stub], worker: MortalWorker, redis: Redis
) -> None:
    session = await a_turn(routers[0])
    await redis.hset(f"qaq:session:{session}", "kept", "0")
    await rejoined(routers[1], session, NEW)
    assert len(worker.asked[-1].page_ids) == NEW


async def test_a_router_that_stops_leaves_its_generations_to_others(
    router_settings: RouterSettings, redis: Redis
) -> None:
    """It tells the worker nothing, which keeps them until their clients are with another router."""
    router = RouterServer(router_settings)
    async with running_worker(redis) as worker, grpc.aio.insecure_channel(await router.start()) as channel:
        worker.gate.clear()
        call = Stub(channel).Generate(request())
        while (await call.read()).WhichOneof("event") != "token":
            pass
        await router.stop()
        assert await call.code() is Code.UNAVAILABLE
        assert (len(worker.ended), worker.cancelled) == (1, [])


async def _gone(redis: Redis, session: str) -> bool:
    return not await redis.exists(f"qaq:session:{session}")


async def _left(redis: Redis, session: str) -> bool:
    times = [await redis.ttl(f"qaq:session:{session}{kind}") for kind in ("", ":tokens")]
    return all(0 < seconds <= LEFT_TTL_S for seconds in times)


async def test_what_cannot_be_rejoined(routers: tuple[Stub, Stub]) -> None:
    session = (await routers[0].OpenSession(generate_pb2.OpenSessionRequest())).session_id
    finished = await a_turn(routers[0])
    for identifier, received, code, sentence in (
        (session, 0, Code.FAILED_PRECONDITION, "nothing was generated"),
        (finished, NEW + 1, Code.INVALID_ARGUMENT, "received is 10"),
        (finished, -1, Code.INVALID_ARGUMENT, "received is -1"),
        ("nobody", 0, Code.NOT_FOUND, "does not exist"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rejoined(routers[1], identifier, received)
        assert caught.value.code() is code
        assert sentence in caught.value.details()
