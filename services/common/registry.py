"""The registry of running servers: members register in Redis and expire when they stop.

`qaq:member:<kind>:<address>` has a member's facts as JSON and expires after 6 s without a heartbeat. The set
`qaq:members:<kind>` has the addresses, so that no client has to scan the keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import psutil
import structlog
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError, WatchError

from services.common import metrics
from services.common.log import once
from services.common.tasks import ended

Kind = Literal["router", "worker", "originals", "gateway", "metrics"]
"""What members are: servers by their roles, and where metrics of servers are."""
SERVERS: tuple[Kind, ...] = ("router", "worker", "originals", "gateway")
Info = Mapping[str, Any]

TTL_S = 6
HEARTBEAT_S = 2.0
_RSS, _VERSION = "rss_bytes", "version"
VERSION = 1
"""Of a member's record. Members of another version are as if they were not registered."""
# A full Redis refuses SET. It allows EXPIRE, and after it the other writes of a script: members must not be lost.
_BEAT = """
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[1])
redis.call('SADD', KEYS[2], ARGV[3])
"""

log = structlog.get_logger()


@dataclass(frozen=True)
class Member:
    """One running server.

    Attributes:
        address: host:port.
        info: the facts that it announced.
        rss_bytes: resident memory of its process at the last heartbeat.
    """

    kind: str
    address: str
    info: dict[str, Any]
    rss_bytes: int = field(default=0, compare=False)

    @property
    def draining(self) -> bool:
        """Whether it hands over what it runs, or has done so, and takes nothing new."""
        return bool(self.info.get("draining"))

    @property
    def retiring(self) -> bool:
        """Whether it finishes what was accepted for its model, which is then served no more."""
        return bool(self.info.get("retiring"))

    @classmethod
    def parse(cls, kind: str, address: str, raw: bytes | str) -> Member | None:
        """A member from its record; None if that is of a version that is not known here."""
        info = json.loads(raw)
        if info.pop(_VERSION, VERSION) != VERSION:
            if once(f"version of {kind} {address}"):
                log.warning("a server of another release is not used", kind=kind, address=address)
            return None
        return cls(kind, address, info, info.pop(_RSS, 0))


class Registry:
    """Membership over Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._script = redis.register_script(_BEAT)

    @contextlib.asynccontextmanager
    async def announce(
        self, kind: Kind, address: str, info: Info | Callable[[], Info]
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Keeps a member registered while the context lasts. A callable `info` is called at every heartbeat.

        Yields:
            a heartbeat for what has changed and is to be known at once; it raises RedisError.
        Raises:
            redis.exceptions.RedisError: the first heartbeat failed. Later ones are retried.
        """
        await self._beat(kind, address, info)
        await self.members(kind)  # removes those that stopped without a word
        heart = asyncio.create_task(self._keep_beating(kind, address, info), name=f"heartbeat {address}")
        try:
            yield partial(self._beat, kind, address, info)
        finally:
            await ended(heart)
            with contextlib.suppress(RedisError):
                await self._forget(kind, [address])

    def announce_metrics(self, at: str, kind: Kind, address: str) -> contextlib.AbstractAsyncContextManager[Any]:
        """Tells gateways, and they Prometheus, where the metrics of a server are while the context lasts.

        Args:
            at: host:port; "" announces nothing.
            kind, address: of the server.
        """
        if not at:
            return contextlib.nullcontext()
        return self.announce("metrics", at, {"job": kind, "instance": address})

    async def members(self, kind: Kind) -> list[Member]:
        """The members with a recent heartbeat, by address."""
        listed = await self._redis.smembers(_set_key(kind))
        addresses = sorted(raw.decode() if isinstance(raw, bytes) else raw for raw in listed)
        if not addresses:
            return []
        values = await self._redis.mget([_key(kind, address) for address in addresses])
        gone = [address for address, value in zip(addresses, values, strict=True) if value is None]
        if gone:
            await self._strike(kind, gone)
        pairs = zip(addresses, values, strict=True)
        found = [Member.parse(kind, address, value) for address, value in pairs if value is not None]
        return [member for member in found if member is not None]

    async def _beat(self, kind: Kind, address: str, info: Info | Callable[[], Info]) -> None:
        facts = {**(info() if callable(info) else info), _VERSION: VERSION, _RSS: psutil.Process().memory_info().rss}
        await self._script(keys=(_key(kind, address), _set_key(kind)), args=(TTL_S, json.dumps(facts), address))

    async def _keep_beating(self, kind: Kind, address: str, info: Info | Callable[[], Info]) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            failure: Exception | None = None
            try:
                await self._beat(kind, address, info)
            except Exception as error:  # whatever it is: without a heartbeat the member would be gone for good
                failure = error
            if failure is not None:
                metrics.registry_failures.inc()
                if once(f"heartbeat {kind} {address}"):
                    log.warning("heartbeat failed; it is retried", kind=kind, address=address, error=str(failure))

    async def _strike(self, kind: Kind, gone: list[str]) -> None:
        """Takes addresses off the list, unless one has come back since it was looked for."""
        keys = [_key(kind, address) for address in gone]
        # The first is of a user who may only read this kind; after the second the next look does it.
        with contextlib.suppress(NoPermissionError, WatchError):
            async with self._redis.pipeline(transaction=True) as pipe:
                await pipe.watch(*keys)
                if any(await pipe.mget(keys)):
                    return
                pipe.multi()
                pipe.srem(_set_key(kind), *gone)
                await pipe.execute()

    async def _forget(self, kind: Kind, addresses: list[str]) -> None:
        await self._redis.delete(*(_key(kind, address) for address in addresses))
        await self._redis.srem(_set_key(kind), *addresses)


def _key(kind: str, address: str) -> str:
    return f"qaq:member:{kind}:{address}"


def _set_key(kind: str) -> str:
    return f"qaq:members:{kind}"
