from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from qaq.v1 import common_pb2
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.errors import FailedPrecondition, NotFound
from services.router import sessions as module
from services.router import token_log
from services.router.sessions import SessionDirectory
from services.router.token_log import LogWriter


@pytest.fixture
def directory(redis: Redis) -> SessionDirectory:
    return SessionDirectory(redis, ttl_s=60)


async def test_a_session_comes_back_as_it_was_opened(directory: SessionDirectory) -> None:
    cache = common_pb2.CacheParams(preset="paper", target_bits=2.5)
    opened = await directory.open("m", cache, kept=True)
    assert await directory.get(opened.id) == opened
    assert opened.cache.target_bits == 2.5


async def test_the_log_takes_a_write_twice_without_harm(directory: SessionDirectory, redis: Redis) -> None:
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    for _ in range(2):
        assert await directory.write(session.id, 0, [1, 2, 70_000])
    assert await directory.write(session.id, 3, [4])
    assert await directory.tokens(session.id) == [1, 2, 70_000, 4]
    assert await redis.get(f"qaq:session:{session.id}:tokens") == b"".join(
        token.to_bytes(4, "little") for token in (1, 2, 70_000, 4)
    )
    assert 0 < await redis.ttl(f"qaq:session:{session.id}:tokens") <= 60


async def test_a_closed_session_is_gone_with_its_log(directory: SessionDirectory, redis: Redis) -> None:
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    await directory.write(session.id, 0, [1])
    await directory.close(session.id)
    assert await directory.write(session.id, 1, [2]) is False
    await directory.set_worker(session.id, "w:1")
    assert [key async for key in redis.scan_iter("qaq:session*")] == []
    with pytest.raises(NotFound, match="does not exist or has expired"):
        await directory.get(session.id)
    with pytest.raises(NotFound):
        await directory.close(session.id)


async def test_list_forgets_what_expired(directory: SessionDirectory, redis: Redis) -> None:
    first = await directory.open("m", common_pb2.CacheParams(), kept=True)
    second = await directory.open("m", common_pb2.CacheParams(), kept=True)
    await directory.write(second.id, 0, [1, 2])
    await redis.delete(f"qaq:session:{first.id}")
    async with directory.running(second.id, lambda: None):
        (listing,) = await directory.list()
    assert (listing.session.id, listing.tokens, listing.running) == (second.id, 2, True)
    assert await redis.zcard(module.INDEX) == 1


async def test_one_generation_at_a_time(directory: SessionDirectory) -> None:
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    async with directory.running(session.id, lambda: None):
        with pytest.raises(FailedPrecondition, match="is generating; wait"):
            async with directory.running(session.id, lambda: None):
                pass
    async with directory.running(session.id, lambda: None):
        pass


async def test_closing_ends_a_generation_of_any_router(
    directory: SessionDirectory, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RUN_REFRESH_S", 0.02)
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    lost = asyncio.Event()
    async with directory.running(session.id, lost.set):
        await SessionDirectory(redis, 60).close(session.id)
        await asyncio.wait_for(lost.wait(), 10)


async def test_the_log_writer_keeps_order_and_drops_nothing(directory: SessionDirectory) -> None:
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    await directory.write(session.id, 0, [9])
    writer = LogWriter(directory, session.id, 1, [0, 1, 2], lambda: None)
    assert await directory.tokens(session.id) == [9]
    for token in range(3, 200):
        writer.add(token)
        if token % 7 == 0:
            await asyncio.sleep(0)
    await writer.flush()
    assert await directory.tokens(session.id) == [9, *range(200)]


async def test_the_log_writer_collects_tokens(directory: SessionDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    write, written = directory.write, []

    async def counted(identifier: str, offset: int, tokens: Sequence[int]) -> bool:
        written.append((offset, len(tokens)))
        return await write(identifier, offset, tokens)

    monkeypatch.setattr(directory, "write", counted)
    monkeypatch.setattr(token_log, "LAG_S", 60.0)
    writer = LogWriter(directory, session.id, 0, [1], lambda: None)
    for token in range(2, 50):
        writer.add(token)
        await asyncio.sleep(0.001)
    assert written == [(0, 2)]  # the prompt and the first token do not wait
    await writer.flush()
    assert written == [(0, 2), (2, 47)]
    assert await directory.tokens(session.id) == [*range(1, 50)]


async def test_the_log_writer_ends_with_its_session(directory: SessionDirectory) -> None:
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    lost = asyncio.Event()
    writer = LogWriter(directory, session.id, 0, [1], lost.set)
    await directory.close(session.id)
    writer.add(2)
    await asyncio.wait_for(lost.wait(), 10)
    await writer.flush()
    assert await directory.tokens(session.id) == []


async def test_the_log_writer_repeats_what_a_lost_write_held(
    directory: SessionDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    writer = LogWriter(directory, session.id, 0, [1], lambda: None)
    write, failures = directory.write, [RedisError("gone"), RedisError("gone")]

    async def flaky(*args: object) -> bool:
        if failures:
            raise failures.pop()
        return await write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(directory, "write", flaky)
    for token in (2, 3):
        writer.add(token)
        await asyncio.sleep(0.01)
    await writer.flush()
    assert await directory.tokens(session.id) == [1, 2, 3]
    assert failures == []


async def test_a_branch_begins_as_its_origin_and_goes_its_own_way(directory: SessionDirectory) -> None:
    cache = common_pb2.CacheParams(target_bits=2.5)
    origin = await directory.open("m", cache, kept=True)
    await directory.write(origin.id, 0, [1, 2, 3])
    await directory.set_worker(origin.id, "w:1")
    branch = await directory.branch(origin.id)
    assert (branch.branch_of, branch.worker, branch.cache, branch.kept) == (origin.id, "w:1", cache, True)
    assert await directory.get(branch.id) == branch
    await directory.write(branch.id, 3, [4])
    await directory.write(origin.id, 3, [5, 6])
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
    async with directory.running(session.id, lambda: None):
        with pytest.raises(FailedPrecondition, match="is generating"):
            await directory.branch(session.id)
    assert len(await directory.list()) == 1
