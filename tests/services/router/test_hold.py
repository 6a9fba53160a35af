"""One generation at a time has a session, and what lost it changes nothing."""

from __future__ import annotations

import asyncio

import pytest
from qaq.v1 import common_pb2, worker_pb2
from redis.asyncio import Redis

from services.common.errors import FailedPrecondition
from services.router import hold as module
from services.router import session_keys
from services.router.hold import Lost
from services.router.sessions import SessionDirectory

from .conftest import opened


async def test_one_generation_at_a_time(directory: SessionDirectory) -> None:
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    async with directory.held(session.id, lambda _: None):
        with pytest.raises(FailedPrecondition, match="is generating; wait"):
            async with directory.held(session.id, lambda _: None):
                pass
    async with directory.held(session.id, lambda _: None):
        pass


async def test_closing_ends_a_generation_of_any_router(
    directory: SessionDirectory, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFRESH_S", 0.02)
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    lost: asyncio.Queue[Lost] = asyncio.Queue()
    async with directory.held(session.id, lost.put_nowait):
        await SessionDirectory(redis, 60).close(session.id)
        assert await asyncio.wait_for(lost.get(), 10) == "closed"


async def test_what_its_client_has_left_expires_soon(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing makes it stay once more, while its generation ends."""
    monkeypatch.setattr(module, "REFRESH_S", 0.02)
    directory = SessionDirectory(redis, 3600)
    session = await directory.open("m", common_pb2.CacheParams(), kept=False)
    async with directory.held(session.id, lambda _: None) as hold:
        assert await hold.leave()
        await asyncio.sleep(0.1)
        assert 0 < await redis.ttl(session_keys.facts(session.id)) <= module.LEFT_TTL_S


@pytest.mark.parametrize("expired", ["the hold alone", "a refresh after it"])
async def test_an_expired_hold_that_nobody_took_is_taken_again(
    directory: SessionDirectory, redis: Redis, monkeypatch: pytest.MonkeyPatch, expired: str
) -> None:
    if expired == "a refresh after it":
        monkeypatch.setattr(module, "REFRESH_S", 0.02)
    lost: list[Lost] = []
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    async with directory.held(session.id, lost.append) as hold:
        await redis.delete(session_keys.hold(session.id))
        if expired == "a refresh after it":
            async with asyncio.timeout(10):
                while not await redis.exists(session_keys.hold(session.id)):  # noqa: ASYNC110 (in Redis)
                    await asyncio.sleep(0.01)
        assert await hold.write(0, [1, 2])
    assert lost == []
    assert await directory.tokens(session.id) == [1, 2]
    assert not await redis.exists(session_keys.hold(session.id))


async def test_what_redis_lost_is_written_down_again_unless_it_is_over(
    directory: SessionDirectory, redis: Redis
) -> None:
    session = await directory.open("m", common_pb2.CacheParams(preset="paper"), kept=True)
    async with directory.held(session.id, lambda _: None) as hold:
        await hold.write(0, [1, 2])
        await hold.set_worker("w:1")
        await redis.flushall()
        assert not await hold.write(2, [3]), "the log is not known"
        assert hold.lost == "gone"
    async with opened(directory) as hold:
        hold.known = lambda: [1, 2, 3]
        await hold.write(0, [1, 2])
        await hold.set_worker("w:1")
        await redis.flushall()
        assert await hold.write(2, [3])
        restored = await directory.get(hold.session)
        assert (restored.worker, restored.kept) == ("w:1", True)
        assert await directory.tokens(hold.session) == [1, 2, 3]
        assert [listing.running for listing in await directory.list()] == [True]
        await redis.flushall()
        await hold.forget()
        assert await redis.dbsize() == 0


async def test_a_session_is_taken_by_who_rejoins(directory: SessionDirectory, redis: Redis) -> None:
    session, lost = await directory.open("m", common_pb2.CacheParams(), kept=True), list[Lost]()
    async with (
        directory.held(session.id, lost.append) as before,
        directory.held(session.id, lambda _: None, take=True) as after,
    ):
        assert await after.write(0, [1])
        assert not await before.write(0, [2])
        assert before.lost == "taken"
    assert await directory.tokens(session.id) == [1]


async def test_a_refresh_that_arrives_after_the_release_takes_nothing(
    directory: SessionDirectory, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    async with directory.held(session.id, lambda _: None) as hold:
        pass
    monkeypatch.setattr(module, "REFRESH_S", 0.0)
    lost: asyncio.Queue[Lost] = asyncio.Queue()
    async with hold.kept(lost.put_nowait):
        assert await asyncio.wait_for(lost.get(), 10) == "taken"
    assert not await redis.exists(session_keys.hold(session.id))


async def test_a_call_that_is_cancelled_again_while_its_keeper_ends_releases_the_session(
    directory: SessionDirectory, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = asyncio.Event()

    async def slow(task: asyncio.Task[None]) -> None:
        task.cancel()
        waiting.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(module, "ended", slow)
    session, held = await directory.open("m", common_pb2.CacheParams(), kept=True), asyncio.Event()

    async def call() -> None:
        async with directory.held(session.id, lambda _: None):
            held.set()
            await asyncio.sleep(60)

    running = asyncio.create_task(call())
    await asyncio.wait_for(held.wait(), 10)
    running.cancel()
    await asyncio.wait_for(waiting.wait(), 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not await redis.exists(session_keys.hold(session.id))


async def test_a_router_that_wakes_up_changes_nothing_of_what_another_one_holds(
    directory: SessionDirectory, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, lost = SessionDirectory(redis, ttl_s=60), asyncio.Queue[Lost]()
    session = await directory.open("m", common_pb2.CacheParams(), kept=False)
    async with directory.held(session.id, lost.put_nowait) as asleep:
        await asleep.write(0, [1, 2])
        await asleep.write_pages([b"p" * 32], 16)
        await redis.delete(session_keys.hold(session.id))
        async with other.held(session.id, lambda _: None) as awake:
            await awake.write(2, [3])
            before = await everything(redis, session.id)
            assert not await asleep.write(2, [9, 9])
            assert not await asleep.write_pages([], 16)
            assert not await asleep.cut(0)
            assert not await asleep.write_turn(worker_pb2.RunRequest(token_ids=[9]))
            assert not await asleep.set_worker("w:9")
            assert not await asleep.forget()
            assert asleep.lost == "taken"
            assert await everything(redis, session.id) == before
            monkeypatch.setattr(module, "REFRESH_S", 0.0)
            async with asleep.kept(lost.put_nowait):
                assert await asyncio.wait_for(lost.get(), 10) == "taken"
            assert await everything(redis, session.id) == before, "its release leaves the other's hold"
            assert await awake.write(3, [4])
    assert await directory.tokens(session.id) == [1, 2, 3, 4]


@pytest.mark.parametrize(("kept", "pages"), [(0, 0), (3, 0), (4, 1), (11, 2), (12, 3), (14, 3)])
async def test_a_cut_leaves_the_pages_without_later_tokens(directory: SessionDirectory, kept: int, pages: int) -> None:
    session, names = await directory.open("m", common_pb2.CacheParams(), kept=True), [bytes([i]) * 32 for i in range(3)]
    async with directory.held(session.id, lambda _: None) as hold:
        await hold.write(0, range(14))
        await hold.write_pages(names, 4)
        assert await hold.cut(kept)
        assert await directory.tokens(session.id) == [*range(kept)]
        assert await directory.pages(session.id) == names[:pages]


async def everything(redis: Redis, session: str) -> list[bytes | None]:
    """What Redis has of a session."""
    return [await redis.dump(key) for key in session_keys.all_of(session)]
