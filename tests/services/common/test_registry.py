"""Registry: members come, are refreshed, and go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from services.common import registry as module
from services.common import tasks
from services.common.embedded_redis import EmbeddedRedis
from services.common.redis import connect
from services.common.registry import Member, Registry
from tests.services.junk import filled
from tests.services.metric import value


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits for a condition to hold."""
    for _ in range(1000):
        if await condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("the condition never held")


async def test_members_of_a_kind_while_they_last(redis: Redis) -> None:
    registry = Registry(redis)
    async with registry.announce("worker", "127.0.0.1:2", {"device": "cpu"}):
        async with registry.announce("worker", "127.0.0.1:1", {}), registry.announce("router", "127.0.0.1:3", {}):
            assert await registry.members("worker") == [
                Member("worker", "127.0.0.1:1", {}),
                Member("worker", "127.0.0.1:2", {"device": "cpu"}),
            ]
            assert [member.address for member in await registry.members("router")] == ["127.0.0.1:3"]
            assert 0 < await redis.ttl("qaq:member:worker:127.0.0.1:1") <= module.TTL_S
        assert [member.address for member in await registry.members("worker")] == ["127.0.0.1:2"]
    assert await registry.members("worker") == []


async def test_heartbeats_publish_what_has_changed(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    registry, load = Registry(redis), 1

    async def published() -> bool:
        return (await registry.members("worker"))[0].info == {"running": 2}

    async with registry.announce("worker", "a:1", lambda: {"running": load}):
        assert (await registry.members("worker"))[0].info == {"running": 1}
        load = 2
        await until(published)


async def test_a_member_without_heartbeat_is_forgotten(redis: Redis) -> None:
    registry = Registry(redis)
    async with registry.announce("originals", "a:1", {}):
        await redis.delete("qaq:member:originals:a:1")  # as its expiry does
        assert await registry.members("originals") == []
        assert await redis.smembers("qaq:members:originals") == set()


async def test_a_member_that_comes_back_at_that_moment_stays_listed(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at its heartbeat and its removal from the list."""
    registry, look = Registry(redis), redis.mget
    async with registry.announce("worker", "a:1", {}):
        await redis.delete("qaq:member:worker:a:1")

        async def late(keys: list[str]) -> list[bytes | None]:
            seen = await look(keys)
            await registry._beat("worker", "a:1", {})
            return seen

        monkeypatch.setattr(redis, "mget", late)
        assert await registry.members("worker") == []
        monkeypatch.undo()
        assert [member.address for member in await registry.members("worker")] == ["a:1"]


async def test_a_member_comes_back_after_redis_lost_everything(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    registry = Registry(redis)

    async def listed() -> bool:
        return bool(await registry.members("worker"))

    async with registry.announce("worker", "a:1", {}):
        await redis.flushdb()
        await until(listed)


async def test_heartbeats_survive_a_redis_that_fails(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    registry = Registry(redis)

    async def failed() -> bool:
        return value(module.metrics.registry_failures) > before

    async def listed() -> bool:
        return bool(await registry.members("worker"))

    before = value(module.metrics.registry_failures)
    async with registry.announce("worker", "a:1", {}):
        # A value of the wrong type makes SADD fail until it is gone.
        await redis.delete("qaq:members:worker")
        await redis.set("qaq:members:worker", "wrong type")
        await until(failed)
        await redis.delete("qaq:members:worker")
        await until(listed)


async def test_a_member_leaves_in_the_middle_of_a_heartbeat(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.0003)
    monkeypatch.setattr(tasks, "CANCEL_AGAIN_S", 0.02)
    registry = Registry(redis)
    for wait in range(40):
        async with registry.announce("worker", "127.0.0.1:1", {}):
            await asyncio.sleep(wait * 0.0001)
    assert await registry.members("worker") == []


async def test_a_heart_beats_on_after_any_error(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    registry, beats = Registry(redis), 0

    def facts() -> dict[str, int]:
        nonlocal beats
        beats += 1
        if beats == 2:
            raise ZeroDivisionError("unforeseen")
        return {"beats": beats}

    async def goes_on() -> bool:
        return (await registry.members("worker"))[0].info["beats"] > 3

    async with registry.announce("worker", "a:1", facts):
        await until(goes_on)


async def test_a_full_redis_keeps_its_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(module, "TTL_S", 1)
    with EmbeddedRedis(maxmemory="4mb") as server:
        client = connect(server.url)
        registry = Registry(client)
        async with registry.announce("worker", "a:1", {}), filled(client):
            for _ in range(15):
                assert [member.address for member in await registry.members("worker")] == ["a:1"]
                await asyncio.sleep(0.1)
            async with registry.announce("originals", "a:2", {}):  # one can even come
                assert len(await registry.members("originals")) == 1
        await client.aclose()
