"""PageIndex: bytes, holders, and who goes first, whatever happens in whatever order."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict

import pytest
from redis.asyncio import Redis

from services.originals.index import BYTES, ENTRY_BYTES, FACTS, FREE, KEYS_PER_CALL, PageIndex

TTL_S = 600


@pytest.fixture
def index(redis: Redis) -> PageIndex:
    return PageIndex(redis, TTL_S)


async def measured(redis: Redis, key: str) -> int:
    return (await redis.memory_usage(key, samples=0) or 0) + ENTRY_BYTES


async def entries(redis: Redis) -> dict[str, int]:
    """Bytes of each entry. The set, the hash and the sum must agree."""
    facts = {key.decode(): int(value.split()[0]) for key, value in (await redis.hgetall(FACTS)).items()}
    assert {key.decode() for key in await redis.zrange(FREE, 0, -1)} == set(facts)
    assert int(await redis.get(BYTES) or 0) == sum(facts.values())
    return facts


async def there(redis: Redis, *keys: str) -> str:
    return "".join([str(await redis.exists(key)) for key in keys])


async def used(redis: Redis) -> int:
    """Bytes in use, without the buffers of connections that carried pages."""
    await redis.connection_pool.disconnect()
    return (await redis.info("memory"))["used_memory"]


async def alive(redis: Redis, keys: list[str]) -> set[str]:
    """Those of the keys that are stored."""
    async with redis.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.exists(key)
        return {key for key, stored in zip(keys, await pipe.execute(), strict=True) if stored}


@pytest.mark.parametrize("seed", range(2))
async def test_the_sum_is_that_of_what_is_stored(redis: Redis, seed: int) -> None:
    """Two cache services put, touch, release, drop and sweep at random: nothing held goes, and every byte counts."""
    rng, services = random.Random(seed), [PageIndex(redis, TTL_S) for _ in range(2)]
    keys = [f"qaq:page:{number}" for number in range(30)]
    budget, holders = 60_000, defaultdict[str, set[str]](set)
    for _ in range(150):
        index, key, holder = rng.choice(services), rng.choice(keys), rng.choice(["aa", "bb", "cc", ""])
        match rng.choice(["put", "put", "put", "touch", "release", "release", "expire", "remove", "evict", "sweep"]):
            case "put":
                new = rng.randbytes(rng.randrange(1, 9000))
                put = await index.put(key, new, holder, budget)
                if put.answer in ("stored", "known"):
                    holders[key] |= {holder} - {""}
                else:
                    assert put.answer == "full"
                    held = [await measured(redis, other) for other in keys if holders[other]]
                    assert sum(held) + put.nbytes > budget
            case "touch":
                some = rng.sample(keys, 5)
                stored = await alive(redis, some)
                assert await index.touch(some, holder) == len(stored)
                for other in stored:
                    holders[other] |= {holder} - {""}
            case "release":
                some = rng.sample(keys, 10)
                await index.release(some, holder)
                for other in some:
                    holders[other] -= {holder}
            case "expire" if not holders[key]:  # a hold is shorter than a life
                await redis.delete(key)
            case "remove":
                async with redis.pipeline(transaction=True) as pipe:
                    pipe.unlink(key)
                    index.leave(pipe, key)
                    await pipe.execute()
                holders[key].clear()
            case "evict":
                await index.evict(rng.randrange(budget))
            case "sweep":
                await index.sweep()
        known, stored = await entries(redis), await alive(redis, keys)
        assert sum(known.values()) <= budget
        assert {key for key in keys if holders[key]} <= stored <= set(known)
    await services[0].touch(keys, "")
    assert await entries(redis) == {key: await measured(redis, key) for key in await alive(redis, keys)}


async def test_the_least_recently_used_go_first_and_of_a_chain_its_end(redis: Redis, index: PageIndex) -> None:
    chain = [f"qaq:page:{number}" for number in range(4)]
    for key in (*chain, "qaq:page:old", "qaq:page:used"):
        await index.put(key, bytes(1000), "aa", None)
    await index.release(["qaq:page:old", "qaq:page:used"], "aa")
    await index.touch(["qaq:page:used"], "")
    await index.release(chain, "aa")
    order = ["qaq:page:old", "qaq:page:used", *chain[::-1]]
    assert [key.decode() for key in await redis.zrange(FREE, 0, -1)] == order
    each = await measured(redis, chain[0])
    assert await index.evict(3 * each) == 3
    assert await there(redis, *order) == "000111"


async def test_a_hold_lasts_until_the_last_holder_releases_it(redis: Redis, index: PageIndex) -> None:
    await index.put("k", b"v", "aa", None)
    await index.touch(["k"], "bb")
    for holder, dropped in (("aa", 0), ("cc", 0), ("bb", 1)):
        await index.release(["k"], holder)
        assert await index.evict(0) == dropped
    assert await entries(redis) == {}


async def test_the_hold_of_a_holder_that_died_runs_out(redis: Redis) -> None:
    index = PageIndex(redis, TTL_S, hold_s=0.05)
    await index.put("k", b"v", "dead", None)
    await index.put("dead before", b"v", "dead", None)
    await asyncio.sleep(0.06)
    await index.touch(["k"], "aa")  # and does not come to be held by the dead one again
    assert b"dead" not in await redis.hget(FACTS, "k")
    assert await index.evict(0) == 1
    assert await there(redis, "k", "dead before") == "10"


async def test_expired_keys_leave(redis: Redis) -> None:
    index = PageIndex(redis, TTL_S)
    for number in range(KEYS_PER_CALL + 5):
        await index.put(f"k{number}", b"v", "", None)
    await index.put("held", b"v", "aa", None)
    await redis.zadd(FREE, {f"k{number}": 1.0 for number in range(KEYS_PER_CALL + 5)})
    await redis.delete(*(f"k{number}" for number in range(1, KEYS_PER_CALL + 5)))
    await index.sweep()
    assert set(await entries(redis)) == {"k0", "held"}


async def test_a_clock_that_was_set_back_holds_nothing_for_ever(redis: Redis, index: PageIndex) -> None:
    await index.put("k", b"v", "aa", None)
    await redis.zadd(FREE, {"k": time.time() + 86_400})
    await index.sweep()
    assert await redis.zscore(FREE, "k") < time.time() + 200


async def test_pages_from_before_the_index_are_counted_when_they_are_touched(redis: Redis, index: PageIndex) -> None:
    await redis.set("k", bytes(5000))
    await index.touch(["k"], "aa")
    assert await entries(redis) == {"k": await measured(redis, "k")}


async def test_scripts_that_redis_forgot_are_sent_again(redis: Redis, index: PageIndex) -> None:
    await index.put("a", b"v", "", None)
    await redis.script_flush()
    assert (await index.put("b", b"v", "", None)).answer == "stored"
    assert set(await entries(redis)) == {"a", "b"}


async def test_many_small_pages_make_way_for_a_large_one(redis: Redis, index: PageIndex) -> None:
    for number in range(2 * KEYS_PER_CALL):
        await index.put(f"k{number}", b"v", "", None)
    budget = await index.nbytes()
    large = bytes(int(0.7 * budget))  # Redis rounds sizes up
    put = await index.put("large", large, "aa", budget)
    assert (put.answer, put.dropped) == ("more", KEYS_PER_CALL)  # the work of one call is bounded
    assert not await redis.exists("large")
    assert (await index.put("large", large, "aa", budget)).answer == "stored"
    assert await index.nbytes() <= budget


async def test_the_sum_is_what_redis_needs(redis: Redis, index: PageIndex) -> None:
    """Never less, for then control keys would have less room than they were given."""
    for size in (3000, 100_000, 1_474_624):
        await redis.flushdb()
        await index.put("first", b"v", "", None)
        before, counted = await used(redis), await index.nbytes()
        for number in range(100 if size < 1e6 else 10):
            await index.put(f"qaq:page:{number:064x}", bytes(size), "a1b2c3d4e5f6", None)
        needed = await used(redis) - before
        assert needed <= await index.nbytes() - counted <= 1.1 * needed + 50_000
