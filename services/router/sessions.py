"""Sessions in Redis: the directory of sessions, and the token log of each, from which its cache can be rebuilt.

`qaq:session:<id>` is a hash with the session's facts and its last request, `…:tokens` the token log as little-endian
int32, `…:pages` the ids of the stored pages of its first tokens (32 bytes each), `…:run` is there while a generation
holds the session. The sorted set `qaq:sessions` has all session ids by the time they were opened.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from qaq.v1 import common_pb2, worker_pb2
from redis.asyncio import Redis

from services.common.errors import FailedPrecondition, NotFound
from services.router import session_keys
from services.router.hold import HOLD_TTL_S, Hold, Lost, Scripts

PAGE_ID_BYTES = 32
TEMPORARY_TTL_S = 60
"""How long a session for one call is kept before the call holds it, should the call end there."""
CLOSED_TTL_S = 60
"""How long it is known that a client closed a session: longer than a generation needs to notice."""


@dataclass(frozen=True)
class Session:
    """Facts of one session.

    Attributes:
        kept: the client opened it, and it outlives its generations.
        worker: address of the worker that has its cache, or "".
        opened_at: seconds since the epoch.
        branch_of: the session that it was copied from, or "".
    """

    id: str
    model: str
    cache: common_pb2.CacheParams
    kept: bool
    worker: str
    opened_at: float
    branch_of: str = ""


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

    async def open(self, model: str, cache: common_pb2.CacheParams, *, kept: bool) -> Session:
        """Opens a session with an empty log."""
        session = Session(secrets.token_urlsafe(16), model, cache, kept, "", time.time())
        async with self._redis.pipeline(transaction=True) as pipe:
            self._add(pipe, session)
            await pipe.execute()
        return session

    async def branch(self, identifier: str) -> Session:
        """Opens a kept session as a copy of another.

        Raises:
            NotFound: there is no such session.
            FailedPrecondition: the session is generating.
        """
        async with self.held(identifier, lambda _: None):
            origin = await self.get(identifier)
            branch = replace(
                origin, id=secrets.token_urlsafe(16), kept=True, opened_at=time.time(), branch_of=identifier
            )
            async with self._redis.pipeline(transaction=True) as pipe:
                self._add(pipe, branch)
                for key in (session_keys.tokens, session_keys.pages):
                    pipe.copy(key(identifier), key(branch.id))
                    pipe.expire(key(branch.id), self._ttl_s)
                await pipe.execute()
        return branch

    def _add(self, pipe: Any, session: Session) -> None:
        """Writes a session's facts and adds it to the index."""
        facts: dict[Any, Any] = {
            "model": session.model,
            "cache": session.cache.SerializeToString(),
            "kept": int(session.kept),
            "worker": session.worker,
            "opened_at": repr(session.opened_at),
            "branch_of": session.branch_of,
        }
        pipe.hset(session_keys.facts(session.id), mapping=facts)
        pipe.expire(session_keys.facts(session.id), self._ttl_s if session.kept else TEMPORARY_TTL_S)
        pipe.zadd(session_keys.INDEX, {session.id: session.opened_at})

    async def get(self, identifier: str) -> Session:
        """Raises:
        NotFound: no session has this id, or it has expired.
        """
        facts = await self._redis.hgetall(session_keys.facts(identifier))
        if not facts:
            raise _unknown(identifier)
        return _session(identifier, facts)

    async def tokens(self, identifier: str) -> list[int]:
        """The whole token log."""
        raw: Any = await self._redis.get(session_keys.tokens(identifier))
        return np.frombuffer(raw or b"", dtype="<i4").tolist()

    async def turn(self, identifier: str) -> worker_pb2.RunRequest | None:
        """The request of the session's last turn; None if it had none."""
        raw: Any = await self._redis.hget(session_keys.facts(identifier), "turn")
        return worker_pb2.RunRequest.FromString(raw) if raw else None

    async def pages(self, identifier: str) -> list[bytes]:
        """Ids of the stored pages of the log's first tokens."""
        raw: Any = await self._redis.get(session_keys.pages(identifier)) or b""
        return [raw[at : at + PAGE_ID_BYTES] for at in range(0, len(raw), PAGE_ID_BYTES)]

    async def close(self, identifier: str) -> Session:
        """Deletes a session. A running generation loses its hold and ends.

        Raises:
            NotFound: there is no such session.
        """
        session = await self.get(identifier)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(session_keys.closed(identifier), 1, ex=CLOSED_TTL_S)
            pipe.delete(*session_keys.all_of(identifier))
            pipe.zrem(session_keys.INDEX, identifier)
            await pipe.execute()
        return session

    async def list(self) -> list[Listing]:
        """Every session, oldest first."""
        listed: Any = await self._redis.zrange(session_keys.INDEX, 0, -1)
        identifiers = [raw.decode() for raw in listed]
        async with self._redis.pipeline(transaction=False) as pipe:
            for identifier in identifiers:
                pipe.hgetall(session_keys.facts(identifier))
                pipe.strlen(session_keys.tokens(identifier))
                pipe.exists(session_keys.hold(identifier))
            answers = await pipe.execute()
        found, expired = [], []
        for place, identifier in enumerate(identifiers):
            facts, size, running = answers[3 * place : 3 * place + 3]
            if facts:
                found.append(Listing(_session(identifier, facts), size // 4, bool(running)))
            else:
                expired.append(identifier)
        if expired:
            await self._redis.zrem(session_keys.INDEX, *expired)
        return found

    @contextlib.asynccontextmanager
    async def held(self, identifier: str, lost: Callable[[Lost], None], *, take: bool = False) -> AsyncIterator[Hold]:
        """Holds a session for one generation.

        Args:
            lost: called when the session is closed, or taken by another generation, meanwhile.
            take: take it from a generation that holds it.
        Raises:
            NotFound: there is no such session.
            FailedPrecondition: another generation holds it.
        """
        keys = [session_keys.facts(identifier), session_keys.hold(identifier)]
        facts: Any = await self._redis.hgetall(keys[0])  # before it is taken: a call cancelled here holds nothing
        fence = int(await self._scripts.acquire(keys=keys, args=[HOLD_TTL_S, int(take)]))
        if fence < 0:
            raise _unknown(identifier)
        if fence == 0:
            raise FailedPrecondition(
                f'session "{identifier}" is generating; wait for its stream to end, or use another session'
            )
        hold = Hold(self._scripts, identifier, fence, facts | {b"fence": str(fence).encode()})
        async with hold.kept(lost):
            yield hold


def _session(identifier: str, facts: Any) -> Session:
    return Session(
        identifier,
        facts[b"model"].decode(),
        common_pb2.CacheParams.FromString(facts[b"cache"]),
        facts[b"kept"] == b"1",
        facts[b"worker"].decode(),
        float(facts[b"opened_at"]),
        facts.get(b"branch_of", b"").decode(),
    )


def _unknown(identifier: str) -> NotFound:
    return NotFound(f'session "{identifier}" does not exist or has expired; open one with OpenSession')
