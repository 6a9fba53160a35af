"""Sessions in Redis: what is kept, who may change it, and the log that is written behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
from qaq.v1 import common_pb2, worker_pb2
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.errors import FailedPrecondition, NotFound
from services.router import hold as module
from services.router import session_keys, token_log
from services.router.hold import Hold, Lost
from services.router.sessions import CLOSED_TTL_S, SessionDirectory
from services.router.token_log import LogWriter


@contextlib.asynccontextmanager
async def opened(directory: SessionDirectory) -> AsyncIterator[Hold]:
    """A new session that a generation holds."""
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    async with directory.held(session.id, lambda _: None) as hold:
        yield hold


@pytest.fixture
def directory(redis: Redis) -> SessionDirectory:
    return SessionDirectory(redis, ttl_s=60)


async def test_a_session_comes_back_as_it_was_opened(directory: SessionDirectory) -> None:
    cache = common_pb2.CacheParams(preset="paper", target_bits=2.5)
    opened = await directory.open("m", cache, kept=True)
    assert await directory.get(opened.id) == opened
    assert opened.cache.target_bits == 2.5


async def test_the_log_takes_a_write_twice_without_harm(directory: SessionDirectory, redis: Redis) -> None:
    async with opened(directory) as hold:
        for _ in range(2):
            assert await hold.write(0, [1, 2, 70_000])
        assert await hold.write(3, [4])
    assert await directory.tokens(hold.session) == [1, 2, 70_000, 4]
    assert await redis.get(f"qaq:session:{hold.session}:tokens") == b"".join(
        token.to_bytes(4, "little") for token in (1, 2, 70_000, 4)
    )
    assert 0 < await redis.ttl(f"qaq:session:{hold.session}:tokens") <= 60


async def test_a_closed_session_is_gone_with_its_log(directory: SessionDirectory, redis: Redis) -> None:
    async with opened(directory) as hold:
        await hold.write(0, [1])
        await directory.close(hold.session)
        assert not await hold.write(1, [2])
        assert hold.lost == "closed"
        await hold.set_worker("w:1")
    (left,) = [key.decode() async for key in redis.scan_iter("qaq:session*")]
    assert left == session_keys.closed(hold.session)
    assert 0 < await redis.ttl(left) <= CLOSED_TTL_S
    with pytest.raises(NotFound, match="does not exist or has expired"):
        await directory.get(hold.session)
    with pytest.raises(NotFound):
        await directory.close(hold.session)
    with pytest.raises(NotFound):
        await directory.held(hold.session, lambda _: None).__aenter__()


async def test_list_forgets_what_expired(directory: SessionDirectory, redis: Redis) -> None:
    first = await directory.open("m", common_pb2.CacheParams(), kept=True)
    await redis.delete(f"qaq:session:{first.id}")
    async with opened(directory) as hold:
        await hold.write(0, [1, 2])
        (listing,) = await directory.list()
    assert (listing.session.id, listing.tokens, listing.running) == (hold.session, 2, True)
    assert await redis.zcard(session_keys.INDEX) == 1


async def test_what_is_damaged_is_as_if_it_did_not_exist(directory: SessionDirectory, redis: Redis) -> None:
    damaged, whole = [await directory.open("m", common_pb2.CacheParams(), kept=True) for _ in range(2)]
    await redis.hset(session_keys.facts(damaged.id), "opened_at", "x")
    assert [listing.session.id for listing in await directory.list()] == [whole.id]
    with pytest.raises(NotFound):
        await directory.get(damaged.id)


async def test_an_id_names_no_other_key_of_a_session(directory: SessionDirectory) -> None:
    async with opened(directory) as hold:
        await hold.write(0, [1])
        for name in (f"{hold.session}:tokens", f"{hold.session}:run", "", "x" * 65):
            with pytest.raises(NotFound, match="does not exist or has expired"):
                await directory.get(name)


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


async def test_the_indexes_do_not_grow_with_what_expired(directory: SessionDirectory, redis: Redis) -> None:
    for round_ in range(2):
        for _ in range(100):
            session = await directory.open("m", common_pb2.CacheParams(), kept=True, tenant="ada")
            if round_ == 0:
                await redis.delete(session_keys.facts(session.id))
    for index in (session_keys.INDEX, session_keys.index("ada")):
        assert 100 <= await redis.zcard(index) < 160
    assert len(await directory.list("ada")) == 100
    assert await directory.list() == []


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
        await asleep.write_pages([b"p" * 32])
        await redis.delete(session_keys.hold(session.id))
        async with other.held(session.id, lambda _: None) as awake:
            await awake.write(2, [3])
            before = await everything(redis, session.id)
            assert not await asleep.write(2, [9, 9])
            assert not await asleep.write_pages([])
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


async def everything(redis: Redis, session: str) -> list[bytes | None]:
    """What Redis has of a session."""
    return [await redis.dump(key) for key in session_keys.all_of(session)]


async def test_the_log_writer_keeps_order_and_drops_nothing(directory: SessionDirectory) -> None:
    async with opened(directory) as hold:
        await hold.write(0, [9])
        writer = LogWriter(hold, 1, [0, 1, 2], lambda: None)
        assert await directory.tokens(hold.session) == [9]
        for token in range(3, 200):
            writer.add(token)
            if token % 7 == 0:
                await asyncio.sleep(0)
        await writer.flush()
    assert await directory.tokens(hold.session) == [9, *range(200)]


async def test_the_log_writer_collects_tokens(directory: SessionDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(directory) as hold:
        write, written = hold.write, []

        async def counted(offset: int, tokens: Sequence[int]) -> bool:
            written.append((offset, len(tokens)))
            return await write(offset, tokens)

        monkeypatch.setattr(hold, "write", counted)
        monkeypatch.setattr(token_log, "LAG_S", 60.0)
        writer = LogWriter(hold, 0, [1], lambda: None)
        for token in range(2, 50):
            writer.add(token)
            await asyncio.sleep(0.001)
        assert written == [(0, 2)]  # the prompt and the first token do not wait
        await writer.flush()
    assert written == [(0, 2), (2, 47)]
    assert await directory.tokens(hold.session) == [*range(1, 50)]


async def test_the_log_writer_ends_with_its_session(directory: SessionDirectory) -> None:
    lost = asyncio.Event()
    async with opened(directory) as hold:
        writer = LogWriter(hold, 0, [1], lost.set)
        await directory.close(hold.session)
        writer.add(2)
        await asyncio.wait_for(lost.wait(), 10)
        await writer.flush()
    assert await directory.tokens(hold.session) == []


async def test_the_log_writer_repeats_what_a_lost_write_held(
    directory: SessionDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(directory) as hold:
        writer = LogWriter(hold, 0, [1], lambda: None)
        write, failures = hold.write, [RedisError("gone"), RedisError("gone")]

        async def flaky(offset: int, tokens: Sequence[int]) -> bool:
            if failures:
                raise failures.pop()
            return await write(offset, tokens)

        monkeypatch.setattr(hold, "write", flaky)
        for token in (2, 3):
            writer.add(token)
            await asyncio.sleep(0.01)
        await writer.flush()
    assert await directory.tokens(hold.session) == [1, 2, 3]
    assert failures == []


async def test_a_branch_begins_as_its_origin_and_goes_its_own_way(directory: SessionDirectory) -> None:
    cache = common_pb2.CacheParams(target_bits=2.5)
    origin = await directory.open("m", cache, kept=True)
    async with directory.held(origin.id, lambda _: None) as hold:
        await hold.write(0, [1, 2, 3])
        await hold.set_worker("w:1")
    branch = await directory.branch(origin.id)
    assert (branch.branch_of, branch.worker, branch.cache, branch.kept) == (origin.id, "w:1", cache, True)
    assert await directory.get(branch.id) == branch
    for session, tokens in ((branch, [4]), (origin, [5, 6])):
        async with directory.held(session.id, lambda _: None) as hold:
            await hold.write(3, tokens)
    assert await directory.tokens(branch.id) == [1, 2, 3, 4]
    assert await directory.tokens(origin.id) == [1, 2, 3, 5, 6]
    await directory.close(origin.id)
    assert await directory.tokens(branch.id) == [1, 2, 3, 4]


async def test_a_branch_of_an_empty_session_is_empty(directory: SessionDirectory) -> None:
    origin = await directory.open("m", common_pb2.CacheParams(), kept=True)
    assert await directory.tokens((await directory.branch(origin.id)).id) == []


async def test_what_cannot_be_branched(directory: SessionDirectory) -> None:
    with pytest.raises(NotFound):
        await directory.branch("nobody")
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    async with directory.held(session.id, lambda _: None):
        with pytest.raises(FailedPrecondition, match="is generating"):
            await directory.branch(session.id)
    assert len(await directory.list()) == 1
