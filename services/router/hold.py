"""A generation's hold on its session: one generation at a time, and no write by one that lost its hold.

Each hold gets the session's next fence number, and every write names it. Redis refuses a write with another number
than the session's, so that a router which stalled, and whose session another router has taken, changes nothing. A hold
that expired while nobody else took the session is taken again, with the same number. A session that is missing and that
nobody closed is one that Redis has lost: the generation writes it down again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import structlog
from qaq.v1 import worker_pb2
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.tasks import ended
from services.router import session_keys

HOLD_TTL_S = 15
REFRESH_S = 2.0
LEFT_TTL_S = 60

Lost = Literal["closed", "taken", "gone"]
"""Why a generation lost its session: a client closed it, another generation has it, or Redis lost it when its log was
not known yet."""

log = structlog.get_logger()

# A full Redis refuses what needs memory. It allows HDEL, and after it the other writes of a script: a generation that
# runs goes on, and its log is written. What begins one, `write_turn`, is refused.
_ALLOWED = "redis.call('HDEL', KEYS[1], '')\n"
_ACQUIRE = f"""
local tenant = redis.call('HGET', KEYS[1], 'tenant') or ''
if redis.call('EXISTS', KEYS[1]) == 0 or tenant ~= ARGV[2] then return -1 end
if redis.call('EXISTS', KEYS[2]) == 1 and ARGV[3] ~= '1' then return 0 end
{_ALLOWED}
local fence = redis.call('HINCRBY', KEYS[1], 'fence', 1)
redis.call('SET', KEYS[2], fence, 'EX', ARGV[1])
return fence
"""
# The answer of every script that changes a session: 1 if it did; else why not.
_REFUSED: dict[int, Lost] = {0: "closed", -1: "gone", -2: "taken"}
_FENCED = """
local fence = redis.call('HGET', KEYS[1], 'fence')
if not fence then return redis.call('EXISTS', KEYS[2]) - 1 end
if fence ~= ARGV[1] then return -2 end
"""
_RUNS = _FENCED + _ALLOWED
# Writes down again what Redis has lost: facts, log and hold.
_RESTORE = """
if redis.call('EXISTS', KEYS[1]) + redis.call('EXISTS', KEYS[2]) > 0 then return end
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('SET', KEYS[3], ARGV[3], 'EX', ARGV[2])
redis.call('SET', KEYS[4], ARGV[1], 'EX', ARGV[2])
local tenant, opened_at = redis.call('HGET', KEYS[1], 'tenant') or '', redis.call('HGET', KEYS[1], 'opened_at')
for _, index in ipairs({KEYS[5], KEYS[5] .. ':' .. tenant}) do redis.call('ZADD', index, opened_at, ARGV[4]) end
"""
_REFRESH = (
    _RUNS
    + """
redis.call('SET', KEYS[3], ARGV[1], 'EX', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""
)
# The number goes up, so that a refresh that is still under way takes nothing.
_RELEASE = _FENCED + "redis.call('DEL', KEYS[3]) redis.call('HINCRBY', KEYS[1], 'fence', 1) return 1"
_WRITE_TURN = _FENCED + "redis.call('HSET', KEYS[1], 'turn', ARGV[2]) return 1"
_SET_WORKER = _RUNS + "redis.call('HSET', KEYS[1], 'worker', ARGV[2]) return 1"
# A write at a known offset, unlike an append, may be sent twice.
_WRITE = (
    _RUNS
    + """
redis.call('SETRANGE', KEYS[3], ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('EXPIRE', KEYS[3], ARGV[4])
return 1
"""
)
_WRITE_PAGES = (
    _RUNS
    + """
redis.call('SET', KEYS[3], ARGV[2], 'EX', ARGV[3])
redis.call('HSET', KEYS[1], 'page_tokens', ARGV[4])
return 1
"""
)
# Of the pages, those stay that hold no later tokens.
_CUT = (
    _RUNS
    + """
local function cut(key, bytes)
  if bytes == 0 then return redis.call('DEL', key) end
  redis.call('SET', key, redis.call('GETRANGE', key, 0, bytes - 1), 'EX', ARGV[3])
end
local page_tokens = tonumber(redis.call('HGET', KEYS[1], 'page_tokens') or 0)
cut(KEYS[3], 4 * ARGV[2])
cut(KEYS[4], page_tokens > 0 and 32 * math.floor(ARGV[2] / page_tokens) or 0)
return 1
"""
)
_LEAVE = (
    _FENCED
    + """
for _, key in ipairs({KEYS[1], KEYS[3], KEYS[4]}) do redis.call('EXPIRE', key, ARGV[2]) end
redis.call('ZREM', KEYS[5] .. ':' .. (redis.call('HGET', KEYS[1], 'tenant') or ''), ARGV[3])
redis.call('ZREM', KEYS[5], ARGV[3])
return 1
"""
)
_FORGET = (
    _FENCED
    + """
redis.call('ZREM', KEYS[6] .. ':' .. (redis.call('HGET', KEYS[1], 'tenant') or ''), ARGV[2])
redis.call('DEL', KEYS[1], KEYS[3], KEYS[4], KEYS[5])
redis.call('ZREM', KEYS[6], ARGV[2])
return 1
"""
)


class Scripts:
    """The scripts that take a session and change it."""

    def __init__(self, redis: Redis, ttl_s: int) -> None:
        self.ttl_s = ttl_s
        self.acquire = redis.register_script(_ACQUIRE)
        self.refresh = redis.register_script(_REFRESH)
        self.release = redis.register_script(_RELEASE)
        self.write_turn = redis.register_script(_WRITE_TURN)
        self.set_worker = redis.register_script(_SET_WORKER)
        self.write = redis.register_script(_WRITE)
        self.write_pages = redis.register_script(_WRITE_PAGES)
        self.cut = redis.register_script(_CUT)
        self.restore = redis.register_script(_RESTORE)
        self.leave = redis.register_script(_LEAVE)
        self.forget = redis.register_script(_FORGET)


class Hold:
    """A session while a generation has it. Every method may raise a RedisError.

    Args:
        facts: of the session, as Redis has them.

    Attributes:
        session: its id. fence: the number of this hold.
        lost: why writes are refused; None while they are not.
        known: the whole log, as Redis has it or will have it soon. None until the generation knows it.
    """

    def __init__(self, scripts: Scripts, session: str, fence: int, facts: Mapping[bytes, bytes]) -> None:
        self.session = session
        self.lost: Lost | None = None
        self.known: Callable[[], Sequence[int]] | None = None
        self.fence = fence
        self._scripts, self._facts = scripts, dict(facts)
        self._over = False
        self._keeper: asyncio.Task[None] | None = None

    async def write(self, offset: int, tokens: Sequence[int]) -> bool:
        """Writes tokens to the log at position `offset`. False if the session was lost."""
        ttl_s = self._scripts.ttl_s
        return await self._run(self._scripts.write, (session_keys.tokens,), offset * 4, _raw(tokens), ttl_s)

    async def write_pages(self, ids: Sequence[bytes], page_tokens: int) -> bool:
        """Replaces the ids of the stored pages of the log's first tokens.

        Args:
            page_tokens: tokens of a page.
        """
        values = (b"".join(ids), self._scripts.ttl_s, page_tokens)
        return await self._run(self._scripts.write_pages, (session_keys.pages,), *values)

    async def cut(self, tokens: int) -> bool:
        """Cuts the log after `tokens` tokens, and the page ids before the first page that has later ones."""
        keys = (session_keys.tokens, session_keys.pages)
        return await self._run(self._scripts.cut, keys, tokens, self._scripts.ttl_s)

    async def write_turn(self, request: worker_pb2.RunRequest) -> bool:
        """Records the request of the turn that begins. Its token_ids are the turn's prompt alone."""
        self._facts[b"turn"] = request.SerializeToString()
        return await self._run(self._scripts.write_turn, (), self._facts[b"turn"])

    async def set_worker(self, address: str) -> bool:
        """Records which worker has the session's cache."""
        self._facts[b"worker"] = address.encode()
        return await self._run(self._scripts.set_worker, (), address)

    async def leave(self) -> bool:
        """Lets a session that was made for one call expire. Its client may have been cut off before it had everything:
        until then it can rejoin."""
        if self._keeper is not None:
            await ended(self._keeper)  # its next refresh would make the session stay
        keys = (session_keys.tokens, session_keys.pages, lambda _: session_keys.INDEX)
        return await self._run(self._scripts.leave, keys, LEFT_TTL_S, self.session)

    async def forget(self) -> bool:
        """Deletes the session."""
        self._over = True
        keys = (session_keys.tokens, session_keys.pages, session_keys.hold, lambda _: session_keys.INDEX)
        return await self._run(self._scripts.forget, keys, self.session)

    @contextlib.asynccontextmanager
    async def kept(self, lost: Callable[[Lost], None]) -> AsyncIterator[None]:
        """Refreshes the hold while the context lasts, then releases it.

        Args:
            lost: called once, when the session turns out to be lost.
        """
        keeper = self._keeper = asyncio.create_task(self._keep(lost), name=f"hold {self.session}")
        try:
            yield
        finally:
            try:
                await ended(keeper)  # before the release: it would take that for the session's end
            finally:  # also when the call is cancelled once more meanwhile
                self._over = True
                with contextlib.suppress(RedisError):  # it expires by itself
                    await self._run(self._scripts.release, (session_keys.hold,))

    async def _keep(self, lost: Callable[[Lost], None]) -> None:
        while self.lost is None:
            await asyncio.sleep(REFRESH_S)
            try:
                await self._run(self._scripts.refresh, (session_keys.hold,), HOLD_TTL_S, self._scripts.ttl_s)
            except RedisError as error:
                log.warning("could not refresh the hold on a session", session=self.session, error=str(error))
        lost(self.lost)

    async def _run(self, script: Any, keys: Sequence[Callable[[str], str]], *args: Any) -> bool:
        """Runs a script that is fenced; notes a refusal. What Redis has lost is written down again first."""
        names = [key(self.session) for key in (session_keys.facts, session_keys.closed, *keys)]
        answer = int(await script(keys=names, args=[self.fence, *args]))
        if _REFUSED.get(answer) == "gone" and self.known is not None and not self._over:
            await self._restore(self.known())
            answer = int(await script(keys=names, args=[self.fence, *args]))
        if answer <= 0:
            self.lost = _REFUSED[answer]
        return answer > 0

    async def _restore(self, tokens: Sequence[int]) -> None:
        log.warning("Redis has lost a session that generates; it is written down again", session=self.session)
        keys = (session_keys.facts, session_keys.closed, session_keys.tokens, session_keys.hold)
        names = [*(key(self.session) for key in keys), session_keys.INDEX]
        facts = [part for pair in self._facts.items() for part in pair]
        args: list[Any] = [self.fence, self._scripts.ttl_s, _raw(tokens), self.session, *facts]
        await self._scripts.restore(keys=names, args=args)


def _raw(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()
