"""The index beside the pages in Redis: how many bytes they take, who holds them, and which go first.

`qaq:pages:free` is a sorted set of the keys that are stored, by the time from which each may be dropped: when its last
holder released it, or, while somebody holds it, when that hold runs out. `qaq:pages:facts` is a hash of each key's
bytes and holders, and `qaq:pages:bytes` the sum of the bytes. Scripts change the three together, so any number of cache
services agree. A key that expired leaves the index when it is looked at or swept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

FREE, FACTS, BYTES = "qaq:pages:free", "qaq:pages:facts", "qaq:pages:bytes"
HOLD_S = 150.0
"""How long a hold lasts. Holders renew it every 60 s; what a dead one held is free when it runs out."""
ENTRY_BYTES = 768
"""What Redis needs for an entry here, and for a key that expires, beside what MEMORY USAGE counts."""
KEYS_PER_CALL = 256
"""Keys that one script call looks at: Redis does nothing else meanwhile."""

Answer = Literal["stored", "known", "full", "more"]

# In every script: ARGV[1] is how long a key lives unused, ARGV[2] how long a hold lasts, both in seconds.
# Each begins with a write that Redis allows when it is full (EXPIRE, UNLINK, HDEL), after which it allows the others:
# they are small, and the bytes that they count must not be lost.
_COMMON = f"""
local FREE, FACTS, BYTES = KEYS[1], KEYS[2], KEYS[3]
local TTL, HOLD = ARGV[1], tonumber(ARGV[2])
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6

local function total()
  return tonumber(redis.call('GET', BYTES) or '0')
end

local function add(bytes)
  if bytes ~= 0 then redis.call('INCRBY', BYTES, string.format('%.0f', bytes)) end
end

local function measure(key)
  return redis.call('MEMORY', 'USAGE', key, 'SAMPLES', '0') + {ENTRY_BYTES}
end

-- Bytes and names of the holders, each behind a space; nothing if the key is not in the index.
local function read(key)
  local size, names = string.match(redis.call('HGET', FACTS, key) or '', '^(%d+)(.*)$')
  return tonumber(size), names
end

local function leave(key)
  local size = read(key)
  redis.call('HDEL', FACTS, key)
  redis.call('ZREM', FREE, key)
  if size then add(-size) end
end

-- Of keys in one call the later ones are free a little earlier: of a chain of pages the last ones go first.
local function note(key, size, holder, place)
  local before, names = read(key)
  local free = tonumber(redis.call('ZSCORE', FREE, key) or '0')
  if not before or free <= now then names = '' end
  if holder ~= '' then
    if #names < 1024 and not string.find(names .. ' ', ' ' .. holder .. ' ', 1, true) then
      names = names .. ' ' .. holder
    end
    free = now + HOLD - place * 1e-6
  elseif names == '' then
    free = now - place * 1e-6
  end
  redis.call('HSET', FACTS, key, string.format('%.0f', size) .. names)
  redis.call('ZADD', FREE, string.format('%.6f', free), key)
  add(size - (before or 0))
end

-- Drops what nobody holds, the least recently used first, until `target` bytes are left or it has looked at `most`.
local function evict(target, most)
  local dropped, looked = 0, 0
  while looked < most and total() > target do
    local first = redis.call('ZRANGE', FREE, 0, 0, 'WITHSCORES')
    if not first[1] or tonumber(first[2]) > now then break end
    dropped = dropped + redis.call('UNLINK', first[1])
    leave(first[1])
    looked = looked + 1
  end
  return dropped, looked
end
"""
# A key that was just set, its holder or '', 1 if it replaced what was there, the budget or -1, and how many keys it may
# look at. Answers what became of it, its bytes, and how many others were dropped for it. It is taken out again if there
# is no room.
_PUT = (
    _COMMON
    + """
local key, holder, budget, most = ARGV[3], ARGV[4], tonumber(ARGV[6]), tonumber(ARGV[7])
redis.call('EXPIRE', key, TTL)
if ARGV[5] == '1' then leave(key) end
local known, size, dropped, looked = read(key), measure(key), 0, 0
if not known and budget >= 0 then
  if size <= budget then dropped, looked = evict(budget - size, most) end
  if total() + size > budget then
    redis.call('UNLINK', key)
    return {looked == most and 'more' or 'full', size, dropped}
  end
end
note(key, size, holder, 0)
return {known and 'known' or 'stored', size, dropped}
"""
)
# Uses keys, for a holder or ''. Answers how many are stored.
_TOUCH = (
    _COMMON
    + """
local stored = 0
for place = 4, #ARGV do
  local key = ARGV[place]
  if redis.call('EXPIRE', key, TTL) == 1 then
    note(key, read(key) or measure(key), ARGV[3], place)
    stored = stored + 1
  else
    leave(key)
  end
end
return stored
"""
)
# Ends a holder's hold on keys.
_RELEASE = (
    _COMMON
    + """
for place = 4, #ARGV do
  local key = ARGV[place]
  local size, names = read(key)
  if size then
    local first, last = string.find(names .. ' ', ' ' .. ARGV[3] .. ' ', 1, true)
    if first then names = string.sub(names, 1, first - 1) .. string.sub(names, last) end
    if names == '' then
      redis.call('EXPIRE', key, TTL)
      redis.call('ZADD', FREE, string.format('%.6f', now - place * 1e-6), key)
    else
      redis.call('HDEL', FACTS, key)
    end
    redis.call('HSET', FACTS, key, string.format('%.0f', size) .. names)
  end
end
"""
)
# A key that was removed, or is not what was put.
_LEAVE = _COMMON + "leave(ARGV[3])"
# Answers how many keys were dropped, and whether there may be more to drop.
_EVICT = (
    _COMMON
    + """
local dropped, looked = evict(tonumber(ARGV[3]), tonumber(ARGV[4]))
return {dropped, looked == tonumber(ARGV[4]) and 1 or 0}
"""
)
# Removes entries whose keys have expired, and corrects times that a clock which was set back has left in the future.
# Answers how many it removed.
_SWEEP = (
    _COMMON
    + """
local most = tonumber(ARGV[3])
local old = redis.call('ZRANGEBYSCORE', FREE, '-inf', string.format('%.6f', now - TTL), 'LIMIT', 0, most)
local gone = 0
for _, key in ipairs(old) do
  if redis.call('EXISTS', key) == 0 then
    leave(key)
    gone = gone + 1
  end
end
local far = string.format('(%.6f', now + HOLD + 1)
for _, key in ipairs(redis.call('ZRANGEBYSCORE', FREE, far, '+inf', 'LIMIT', 0, most)) do
  redis.call('EXPIRE', key, TTL)
  redis.call('ZADD', FREE, string.format('%.6f', now + HOLD), key)
end
return gone
"""
)


@dataclass(frozen=True)
class Put:
    """What became of a key that was put.

    Attributes:
        answer: "full": everything else is held, and the key was not kept; "more": the same, but there is more to drop.
        nbytes: its bytes in Redis. dropped: keys that were dropped for it.
    """

    answer: Answer
    nbytes: int
    dropped: int


class PageIndex:
    """The index over Redis. Every method may raise a RedisError.

    Args:
        ttl_s: seconds until a key expires that is not used.
    """

    def __init__(self, redis: Redis, ttl_s: int, hold_s: float = HOLD_S) -> None:
        self._redis = redis
        self._lives = (ttl_s, hold_s)
        self._ttl_s = ttl_s
        self._put, self._touch, self._release, self._leave, self._evict, self._sweep = (
            redis.register_script(script) for script in (_PUT, _TOUCH, _RELEASE, _LEAVE, _EVICT, _SWEEP)
        )

    async def put(
        self, key: str, value: bytes | memoryview, holder: str, budget: int | None, *, replace: bool = False
    ) -> Put:
        """Stores a value within the budget, and counts it. It then has one holder more.

        Args:
            replace: also if the key is known; otherwise the first value stays.
        """
        args = (key, holder, int(replace), -1 if budget is None else budget, KEYS_PER_CALL)
        async with self._redis.pipeline(transaction=True) as pipe:
            # One transaction, in which the value does not pass through the script: that would copy it twice.
            pipe.set(key, value, ex=self._ttl_s, nx=not replace)
            self._queue(pipe, self._put, *args)
            try:
                _, reply = await pipe.execute()
            except NoScriptError:  # Redis was started again; the value is set
                reply = await self._run(self._put, *args)
        answer, nbytes, dropped = reply
        return Put(answer.decode(), nbytes, dropped)

    async def touch(self, keys: Sequence[str], holder: str) -> int:
        """Postpones the expiry of keys and holds them. Returns how many are stored."""
        return sum([await self._run(self._touch, holder, *part) for part in _parts(keys)])

    async def release(self, keys: Sequence[str], holder: str) -> None:
        """Ends a holder's hold. A key without another holder may be dropped for others."""
        for part in _parts(keys):
            await self._run(self._release, holder, *part)

    def leave(self, pipe: Any, key: str) -> None:
        """Adds to a transaction that removes a key."""
        pipe.eval(self._leave.script, 3, FREE, FACTS, BYTES, *self._lives, key)

    async def evict(self, target: int) -> int:
        """Drops what nobody holds until `target` bytes are left. Returns how many keys were dropped."""
        dropped, more = 0, 1
        while more:
            some, more = await self._run(self._evict, target, KEYS_PER_CALL)
            dropped += some
        return dropped

    async def sweep(self) -> None:
        """Removes the entries of keys that have expired."""
        while await self._run(self._sweep, KEYS_PER_CALL):
            pass

    async def nbytes(self) -> int:
        """Bytes of all keys in the index."""
        return int(await self._redis.get(BYTES) or 0)

    async def _run(self, script: Any, *args: Any) -> Any:
        return await script(keys=(FREE, FACTS, BYTES), args=(*self._lives, *args))

    def _queue(self, pipe: Any, script: Any, *args: Any) -> None:
        # Not `script(client=pipe)`, which asks Redis before each transaction whether it knows the script.
        pipe.evalsha(script.sha, 3, FREE, FACTS, BYTES, *self._lives, *args)


def _parts(keys: Sequence[str]) -> list[Sequence[str]]:
    """Keys of one call each, the last ones first: they are the first to be free."""
    return [keys[start : start + KEYS_PER_CALL] for start in range(0, len(keys), KEYS_PER_CALL)][::-1]
