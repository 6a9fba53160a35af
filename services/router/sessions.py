"""Sessions in Redis: the directory of sessions, and the token log of each, from which its cache can be rebuilt.

`qaq:session:<id>` is a hash with the session's facts and its last request, `…:tokens` the token log as little-endian
int32, `…:pages` the ids of the stored pages of its first tokens (32 bytes each), `…:run` a lock that is held while a
generation runs. The sorted set `qaq:sessions` has all session ids by the time they were opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import structlog
from qaq.v1 import common_pb2, worker_pb2
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.errors import FailedPrecondition, NotFound
from services.common.tasks import ended

RUN_TTL_S = 15
RUN_REFRESH_S = 2.0
LOCK_RETRY_S = 0.1
PAGE_ID_BYTES = 32
INDEX = "qaq:sessions"

log = structlog.get_logger()

# A write at a known offset, unlike an append, may be sent twice. The check that the session exists keeps a log from
# being recreated after its session was closed.
_WRITE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('SETRANGE', KEYS[2], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 1
"""
_WRITE_PAGES = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
return 1
"""
_CUT = """
redis.call('SET', KEYS[1], redis.call('GETRANGE', KEYS[1], 0, ARGV[1] - 1), 'EX', ARGV[2])
redis.call('DEL', KEYS[2])
"""
_SET_IF_OPEN = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
"""
_REFRESH = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('EXPIRE', KEYS[1], ARGV[2]) end return 0"
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


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
        self._write = redis.register_script(_WRITE)
        self._write_pages = redis.register_script(_WRITE_PAGES)
        self._cut = redis.register_script(_CUT)
        self._set_if_open = redis.register_script(_SET_IF_OPEN)
        self._refresh = redis.register_script(_REFRESH)
        self._release = redis.register_script(_RELEASE)

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
        async with self.running(identifier, lambda: None):
            origin = await self.get(identifier)
            branch = replace(
                origin, id=secrets.token_urlsafe(16), kept=True, opened_at=time.time(), branch_of=identifier
            )
            async with self._redis.pipeline(transaction=True) as pipe:
                self._add(pipe, branch)
                for key in (_tokens_key, _pages_key):
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
        pipe.hset(_key(session.id), mapping=facts)
        pipe.expire(_key(session.id), self._ttl_s)
        pipe.zadd(INDEX, {session.id: session.opened_at})

    async def get(self, identifier: str) -> Session:
        """Raises:
        NotFound: no session has this id, or it has expired.
        """
        facts = await self._redis.hgetall(_key(identifier))
        if not facts:
            raise _unknown(identifier)
        return _session(identifier, facts)

    async def tokens(self, identifier: str) -> list[int]:
        """The whole token log."""
        raw: Any = await self._redis.get(_tokens_key(identifier))
        return np.frombuffer(raw or b"", dtype="<i4").tolist()

    async def write(self, identifier: str, offset: int, tokens: Sequence[int]) -> bool:
        """Writes tokens to the log at position `offset`. False if the session was closed."""
        raw = np.asarray(tokens, dtype="<i4").tobytes()
        keys = [_key(identifier), _tokens_key(identifier)]
        return bool(await self._write(keys=keys, args=[offset * 4, raw, self._ttl_s]))

    async def cut(self, identifier: str, tokens: int) -> None:
        """Cuts the log after `tokens` tokens, and deletes the page ids, whose pages may have later tokens."""
        await self._cut(keys=[_tokens_key(identifier), _pages_key(identifier)], args=[tokens * 4, self._ttl_s])

    async def write_turn(self, identifier: str, request: worker_pb2.RunRequest) -> None:
        """Records the request of the turn that begins. Its token_ids are the turn's prompt alone."""
        await self._set_if_open(keys=[_key(identifier)], args=["turn", request.SerializeToString()])

    async def turn(self, identifier: str) -> worker_pb2.RunRequest | None:
        """The request of the session's last turn; None if it had none."""
        raw: Any = await self._redis.hget(_key(identifier), "turn")
        return worker_pb2.RunRequest.FromString(raw) if raw else None

    async def pages(self, identifier: str) -> list[bytes]:
        """Ids of the stored pages of the log's first tokens."""
        raw: Any = await self._redis.get(_pages_key(identifier)) or b""
        return [raw[at : at + PAGE_ID_BYTES] for at in range(0, len(raw), PAGE_ID_BYTES)]

    async def write_pages(self, identifier: str, ids: Sequence[bytes]) -> None:
        """Replaces the page ids, unless the session was closed."""
        keys = [_key(identifier), _pages_key(identifier)]
        await self._write_pages(keys=keys, args=[b"".join(ids), self._ttl_s])

    async def set_worker(self, identifier: str, address: str) -> None:
        """Records which worker has the session's cache."""
        await self._set_if_open(keys=[_key(identifier)], args=["worker", address])

    async def close(self, identifier: str) -> Session:
        """Deletes a session. A running generation loses its lock and ends.

        Raises:
            NotFound: there is no such session.
        """
        session = await self.get(identifier)
        await self.forget(identifier)
        return session

    async def forget(self, identifier: str) -> None:
        """As `close`, without an error if there is no such session."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(*(key(identifier) for key in (_key, _tokens_key, _pages_key, _run_key)))
            pipe.zrem(INDEX, identifier)
            await pipe.execute()

    async def list(self) -> list[Listing]:
        """Every session, oldest first."""
        listed: Any = await self._redis.zrange(INDEX, 0, -1)
        identifiers = [raw.decode() for raw in listed]
        async with self._redis.pipeline(transaction=False) as pipe:
            for identifier in identifiers:
                pipe.hgetall(_key(identifier))
                pipe.strlen(_tokens_key(identifier))
                pipe.exists(_run_key(identifier))
            answers = await pipe.execute()
        found, expired = [], []
        for place, identifier in enumerate(identifiers):
            facts, size, running = answers[3 * place : 3 * place + 3]
            if facts:
                found.append(Listing(_session(identifier, facts), size // 4, bool(running)))
            else:
                expired.append(identifier)
        if expired:
            await self._redis.zrem(INDEX, *expired)
        return found

    @contextlib.asynccontextmanager
    async def running(self, identifier: str, lost: Callable[[], None], patience_s: float = 0.0) -> AsyncIterator[None]:
        """Locks a session for one generation.

        Args:
            lost: called when the session is closed meanwhile.
            patience_s: how long to wait for another generation to release the lock.
        Raises:
            FailedPrecondition: another generation has the lock.
        """
        holder, ends = secrets.token_hex(8), time.monotonic() + patience_s
        while not await self._redis.set(_run_key(identifier), holder, nx=True, ex=RUN_TTL_S):
            if time.monotonic() >= ends:
                raise FailedPrecondition(
                    f'session "{identifier}" is generating; wait for its stream to end, or use another session'
                )
            await asyncio.sleep(LOCK_RETRY_S)
        keeper = asyncio.create_task(self._keep(identifier, holder, lost), name=f"lock {identifier}")
        try:
            yield
        finally:
            await ended(keeper)  # before the lock is released: it would take that for the session's end
            with contextlib.suppress(RedisError):  # it expires by itself
                await self._release(keys=[_run_key(identifier)], args=[holder])

    async def _keep(self, identifier: str, holder: str, lost: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(RUN_REFRESH_S)
            try:
                held = await self._refresh(keys=[_run_key(identifier)], args=[holder, RUN_TTL_S])
            except RedisError as error:
                log.warning("could not refresh the lock of a session", session=identifier, error=str(error))
                continue
            if not held:
                lost()
                return


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


def _key(identifier: str) -> str:
    return f"qaq:session:{identifier}"


def _tokens_key(identifier: str) -> str:
    return f"qaq:session:{identifier}:tokens"


def _pages_key(identifier: str) -> str:
    return f"qaq:session:{identifier}:pages"


def _run_key(identifier: str) -> str:
    return f"qaq:session:{identifier}:run"
