"""A client finds a router that answers, and another one when that is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from qaq.v1 import generate_pb2
from redis.asyncio import Redis

from services.common.embedded_redis import EmbeddedRedis, free_port
from services.common.errors import Unavailable
from services.common.redis import connect
from services.common.registry import Registry
from services.common.routers import Find, Routers, named, registered
from tests.services.common.routing import Foreseen, serving


@contextlib.asynccontextmanager
async def reached(find: Find) -> AsyncIterator[Routers]:
    routers = Routers(find)
    yield routers
    await routers.close()


@contextlib.asynccontextmanager
async def two(one: Foreseen) -> AsyncIterator[tuple[Routers, str, str]]:
    """A client of this router and another one, and their addresses."""
    async with (
        serving(one),
        serving(Foreseen()) as other,
        reached(named(f"{nobody()}, {one.address},{other.address}")) as routers,
    ):
        yield routers, one.address, other.address


async def who(routers: Routers) -> str:
    """The address of the router that answers."""
    async with routers.stub() as stub:
        return (await stub.GetModel(generate_pb2.GetModelRequest(), timeout=30)).model.name


def nobody() -> str:
    return f"127.0.0.1:{free_port()}"


async def test_the_first_that_answers_is_taken() -> None:
    async with two(Foreseen()) as (routers, one, _):
        assert await asyncio.gather(*(who(routers) for _ in range(4))) == [one] * 4


async def test_calls_go_to_the_next_when_one_is_gone() -> None:
    async with serving(Foreseen()) as other, contextlib.AsyncExitStack() as life:
        one = await life.enter_async_context(serving(Foreseen()))
        routers = Routers(named(f"{one.address},{other.address}"))
        assert await who(routers) == one.address
        await life.aclose()
        with contextlib.suppress(grpc.aio.AioRpcError):  # one call may come before the connection's end
            await who(routers)
        assert await who(routers) == other.address
        await routers.close()


async def test_one_that_broke_a_call_is_asked_last() -> None:
    async with two(Foreseen(breaks_at=0)) as (routers, one, other):
        assert await who(routers) == one
        with pytest.raises(grpc.aio.AioRpcError):
            async with routers.stub() as stub:
                await stub.Generate(generate_pb2.GenerateRequest()).read()
        assert await who(routers) == other


async def test_nobody_answers() -> None:
    addresses = nobody(), nobody()
    async with reached(named(",".join(addresses))) as routers:
        with pytest.raises(Unavailable, match=f"no router answers at {', '.join(addresses)}; start one"):
            await who(routers)


async def test_those_that_are_registered(redis: Redis) -> None:
    announce = Registry(redis).announce
    async with reached(registered(redis)) as routers:
        with pytest.raises(Unavailable, match="no router is registered"):
            await who(routers)
        async with (
            serving(Foreseen()) as one,
            announce("router", one.address, {}),
            announce("router", nobody(), {}),
        ):
            assert await who(routers) == one.address


async def test_the_last_list_is_used_while_redis_does_not_answer() -> None:
    with EmbeddedRedis() as server:
        redis = connect(server.url)
        async with serving(Foreseen()) as router, Registry(redis).announce("router", router.address, {}):
            find = registered(redis)
            assert await find() == [router.address]
            server.terminate()
            assert await find() == [router.address]
            with pytest.raises(Unavailable, match="Redis does not answer"):
                await registered(redis)()
        await redis.aclose()
