"""Sessions in Redis: what is kept, listed, closed and branched."""

from __future__ import annotations

import grpc
import pytest
from qaq.v1 import common_pb2, worker_pb2
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from services.common.errors import FailedPrecondition, NotFound, to_status
from services.router import session_keys
from services.router.sessions import CLOSED_TTL_S, SessionDirectory

from .conftest import opened


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


async def test_a_damaged_log_is_told(directory: SessionDirectory, redis: Redis) -> None:
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    for raw, what in (
        (b"\1\0\0\0\2", "its token log has 5 bytes"),
        (b"\1\0\0\0\xff\xff\xff\xff", "tokens that the model does not have"),
        ((50_000).to_bytes(4, "little"), "tokens that the model does not have"),
    ):
        await redis.set(session_keys.tokens(session.id), raw)
        with pytest.raises(FailedPrecondition, match=f"is damaged in Redis, .*{what}; close it"):
            await directory.tokens(session.id, 49152)
    for turn in (b"\xff\xff", worker_pb2.RunRequest(history_tokens=-5).SerializeToString()):
        await redis.hset(session_keys.facts(session.id), "turn", turn)
        with pytest.raises(FailedPrecondition, match="its last request"):
            await directory.turn(session.id)
    await redis.set(session_keys.pages(session.id), b"x" * 32 + b"y" * 31)
    assert await directory.pages(session.id) == [b"x" * 32]
    await directory.close(session.id)
    assert await directory.list() == []


async def test_values_of_other_types_do_not_hide_other_sessions(directory: SessionDirectory, redis: Redis) -> None:
    facts, log, nan, whole = [await directory.open("m", common_pb2.CacheParams(), kept=True) for _ in range(4)]
    await redis.delete(session_keys.facts(facts.id))
    await redis.set(session_keys.facts(facts.id), "x")
    await redis.lpush(session_keys.tokens(log.id), "x")
    await redis.hset(session_keys.facts(nan.id), "opened_at", "nan")
    await redis.zadd(session_keys.INDEX, {b"\xff\xfe": 1})
    await redis.zadd(session_keys.index(""), {b"\xff\xfe": 1})
    assert {listing.session.id for listing in await directory.list()} == {log.id, whole.id}
    with pytest.raises(ResponseError) as caught:
        await directory.tokens(log.id)
    status = to_status(caught.value)
    assert status is not None
    assert (status.code, "none that QAQ writes" in status.message) == (grpc.StatusCode.DATA_LOSS, True)
    await redis.hset(session_keys.facts(whole.id), "fence", "x")
    with pytest.raises(ResponseError) as caught:
        async with directory.held(whole.id, lambda _: None):
            pass
    status = to_status(caught.value)
    assert status is not None
    assert status.code is grpc.StatusCode.DATA_LOSS
