"""Sessions in Redis: the directory of sessions, and the token log of each, from which its cache can be rebuilt.

`qaq:session:<id>` is a hash with the session's facts and its last request, `…:tokens` the token log as little-endian
int32, `…:pages` the ids of the stored pages of its first tokens (32 bytes each), `…:run` is there while a generation
holds the session. The sorted set `qaq:sessions` has all session ids by the time they were opened, and
`qaq:sessions:<tenant>` those of a tenant.

A session belongs to the tenant that opened it. For another tenant it does not exist.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import structlog
from google.protobuf.message import DecodeError
from qaq.v1 import common_pb2, worker_pb2
from redis.asyncio import Redis

from services.common.errors import EXCEEDED, FailedPrecondition, NotFound, ResourceExhausted
from services.router import session_keys
from services.router.hold import HOLD_TTL_S, Hold, Lost, Scripts
from services.router.session import Session

log = structlog.get_logger()

PAGE_ID_BYTES, TOKEN_BYTES = 32, 4
MAX_TOKEN = 2**31
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
TEMPORARY_TTL_S = 60
"""How long a session for one call is kept before the call holds it, should the call end there."""
CLOSED_TTL_S = 60
"""How long it is known that a client closed a session: longer than a generation needs to notice."""


# Answers 0 if the tenant has as many open sessions as it may have; expired ones are removed before that is said. Of the
# indexes two entries are looked at each time, so that expired ones are never many more than the others.
_OPEN = """
local limit = tonumber(ARGV[1])
if limit > 0 and redis.call('ZCARD', KEYS[3]) >= limit then
  local open = 0
  for _, id in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
    local kept = redis.call('HGET', ARGV[5] .. id, 'kept')
    if not kept then redis.call('ZREM', KEYS[3], id) elseif kept == '1' then open = open + 1 end
  end
  if open >= limit then return 0 end
end
for index = 2, 3 do
  for _, id in ipairs(redis.call('ZRANDMEMBER', KEYS[index], 2)) do
    if redis.call('EXISTS', ARGV[5] .. id) == 0 then redis.call('ZREM', KEYS[index], id) end
  end
end
for index = 4, #KEYS, 2 do
  redis.call('COPY', KEYS[index], KEYS[index + 1])
  redis.call('EXPIRE', KEYS[index + 1], ARGV[4])
end
redis.call('HSET', KEYS[1], unpack(ARGV, 6))
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[2])
redis.call('ZADD', KEYS[3], ARGV[3], ARGV[2])
return 1
"""

_SET_FLOOR = "if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'lambda_floor', ARGV[1]) end"


@dataclass(frozen=True)
class Listing:
    """An entry of `SessionDirectory.list`."""

    session: Session
    tokens: int
    running: bool


class SessionDirectory:
    """The sessions of all routers. Every method may raise a RedisError."""

    def __init__(self, redis: Redis, ttl_s: int) -> None:
        self._redis = redis
        self._ttl_s = ttl_s
        self._scripts = Scripts(redis, ttl_s)
        self._open = redis.register_script(_OPEN)
        self._set_floor = redis.register_script(_SET_FLOOR)

    async def open(
        self, model: str, cache: common_pb2.CacheParams, *, kept: bool, tenant: str = "", limit: int | None = None
    ) -> Session:
        """Opens a session with an empty log.

        Args:
            limit: kept sessions that the tenant may have.
        Raises:
            ResourceExhausted: it has as many.
        """
        session = Session(secrets.token_urlsafe(16), model, cache, kept, "", time.time(), tenant=tenant)
        await self._add(session, limit)
        return session

    async def branch(self, identifier: str, tenant: str = "", limit: int | None = None) -> Session:
        """Opens a kept session as a copy of another.

        Raises:
            NotFound: the tenant has no such session.
            FailedPrecondition: the session is generating.
            ResourceExhausted: the tenant has `limit` sessions.
        """
        async with self.held(identifier, lambda _: None, tenant=tenant):
            origin = await self.get(identifier, tenant)
            branch = replace(
                origin, id=secrets.token_urlsafe(16), kept=True, opened_at=time.time(), branch_of=identifier
            )
            await self._add(branch, limit)
        return branch

    async def _add(self, session: Session, limit: int | None) -> None:
        """Writes a session's facts, copies its origin's log, and adds it to the indexes: all of it or nothing, also if
        this is cancelled."""
        ttl_s = self._ttl_s if session.kept else TEMPORARY_TTL_S
        kinds = (session_keys.tokens, session_keys.pages) if session.branch_of else ()
        copied = [key(identifier) for key in kinds for identifier in (session.branch_of, session.id)]
        added = await self._open(
            keys=[session_keys.facts(session.id), session_keys.INDEX, session_keys.index(session.tenant), *copied],
            args=[
                *(limit if limit and session.kept else 0, session.id, session.opened_at, ttl_s, session_keys.facts("")),
                *(part for fact in session.facts().items() for part in fact),
            ],
        )
        if not added:
            raise ResourceExhausted(
                f"the tenant has {limit} sessions open, the most it may have; close one, or wait until one expires",
                reason=EXCEEDED,
            )

    async def get(self, identifier: str, tenant: str | None = "") -> Session:
        """A session of a tenant; None is any tenant.

        Raises:
            NotFound: the tenant has no session with this id, or it has expired.
        """
        if not _ID.fullmatch(identifier):  # it might name another key of a session
            raise _unknown(identifier)
        facts = await self._redis.hgetall(session_keys.facts(identifier))
        session = Session.parse(identifier, facts) if facts else None
        if session is None or tenant not in (None, session.tenant):
            raise _unknown(identifier)
        return session

    async def tokens(self, identifier: str, vocabulary: int | None = None) -> list[int]:
        """The whole token log.

        Args:
            vocabulary: number of token ids.
        Raises:
            FailedPrecondition: it is damaged.
        """
        raw: Any = await self._redis.get(session_keys.tokens(identifier)) or b""
        if len(raw) % TOKEN_BYTES:
            raise _damaged(identifier, f"its token log has {len(raw)} bytes")
        log = np.frombuffer(raw, dtype="<i4")
        if len(log) and not 0 <= log.min() <= log.max() < (vocabulary or MAX_TOKEN):
            raise _damaged(identifier, "its token log has tokens that the model does not have")
        return log.tolist()

    async def turn(self, identifier: str) -> worker_pb2.RunRequest | None:
        """The request of the session's last turn; None if it had none.

        Raises:
            FailedPrecondition: it is damaged.
        """
        raw: Any = await self._redis.hget(session_keys.facts(identifier), "turn")
        try:
            turn = worker_pb2.RunRequest.FromString(raw) if raw else None
        except DecodeError as error:
            raise _damaged(identifier, "its last request cannot be read") from error
        if turn is not None and turn.history_tokens < 0:
            raise _damaged(identifier, "its last request cannot be")
        return turn

    async def pages(self, identifier: str) -> list[bytes]:
        """Ids of the stored pages of the log's first tokens. A part of an id is none."""
        raw: Any = await self._redis.get(session_keys.pages(identifier)) or b""
        return [raw[at : at + PAGE_ID_BYTES] for at in range(0, len(raw) - PAGE_ID_BYTES + 1, PAGE_ID_BYTES)]

    async def set_floor(self, identifier: str, floor: float) -> None:
        """Writes the least price of a bit down, for the session's next turns. Does nothing if it was closed."""
        await self._set_floor(keys=[session_keys.facts(identifier)], args=[repr(floor)])

    async def close(self, identifier: str, tenant: str | None = "") -> Session:
        """Deletes a session. A running generation loses its hold and ends.

        Raises:
            NotFound: the tenant has no such session; None is any tenant.
        """
        session = await self.get(identifier, tenant)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(session_keys.closed(identifier), 1, ex=CLOSED_TTL_S)
            pipe.delete(*session_keys.all_of(identifier))
            for index in (session_keys.INDEX, session_keys.index(session.tenant)):
                pipe.zrem(index, identifier)
            await pipe.execute()
        return session

    async def list(self, tenant: str | None = "") -> list[Listing]:
        """Every session of a tenant, oldest first; None is all tenants."""
        index = session_keys.INDEX if tenant is None else session_keys.index(tenant)
        listed: Any = await self._redis.zrange(index, 0, -1)
        identifiers = [raw.decode(errors="replace") for raw in listed]
        async with self._redis.pipeline(transaction=False) as pipe:
            for identifier in identifiers:
                pipe.hgetall(session_keys.facts(identifier))
                pipe.strlen(session_keys.tokens(identifier))
                pipe.exists(session_keys.hold(identifier))
            answers = await pipe.execute(raise_on_error=False)
        found, expired = [], []
        for place, identifier in enumerate(identifiers):
            facts, size, running = answers[3 * place : 3 * place + 3]
            session = Session.parse(identifier, facts) if facts else None
            if session is not None:
                tokens = size // TOKEN_BYTES if isinstance(size, int) else 0  # else what is there is no log
                found.append(Listing(session, tokens, bool(running)))
            elif not facts:
                expired.append(identifier)
        if expired:
            for each in {index, session_keys.INDEX}:
                await self._redis.zrem(each, *expired)
        return found

    @contextlib.asynccontextmanager
    async def held(
        self, identifier: str, lost: Callable[[Lost], None], tenant: str = "", *, take: bool = False
    ) -> AsyncIterator[Hold]:
        """Holds a session for one generation.

        Args:
            lost: called when the session is closed, or taken by another generation, meanwhile.
            take: take it from a generation that holds it.
        Raises:
            NotFound: the tenant has no such session.
            FailedPrecondition: another generation holds it.
        """
        keys = [session_keys.facts(identifier), session_keys.hold(identifier)]
        facts: Any = await self._redis.hgetall(keys[0])  # before it is taken: a call cancelled here holds nothing
        fence = int(await self._scripts.acquire(keys=keys, args=[HOLD_TTL_S, tenant, int(take)]))
        if fence < 0:
            raise _unknown(identifier)
        if fence == 0:
            raise FailedPrecondition(
                f'session "{identifier}" is generating; wait for its stream to end, or use another session'
            )
        hold = Hold(self._scripts, identifier, fence, facts | {b"fence": str(fence).encode()})
        async with hold.kept(lost):
            yield hold


def _damaged(identifier: str, what: str) -> FailedPrecondition:
    return FailedPrecondition(f'session "{identifier}" is damaged in Redis, {what}; close it, and open a new one')


def _unknown(identifier: str) -> NotFound:
    return NotFound(f'session "{identifier}" does not exist or has expired; open one with OpenSession')
