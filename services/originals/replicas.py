"""The cache services that a client may call: found, chosen, avoided for a while when they fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import grpc
import structlog
from blake3 import blake3
from qaq.v1 import originals_pb2_grpc
from redis.exceptions import RedisError

from qaq_core.base.errors import OriginalsError
from services.common import metrics
from services.common.channel import open_channel
from services.common.log import once

Finder = Callable[[], Awaitable[Sequence[str]]]

REFRESH_S = 1.0
AVOID_S = 5.0
_CLOSE_GRACE_S = 60.0  # above every deadline: a call that runs ends by itself

log = structlog.get_logger()


class NoAnswerError(OriginalsError):
    """No cache service answers, or the one that does is full: worth repeating."""


class Replicas:
    """Channels to the replicas that `find` lists. Belongs to one event loop."""

    def __init__(self, find: Finder) -> None:
        self._find = find
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._avoided: dict[str, float] = {}
        self._found_at = -REFRESH_S
        self._refreshing = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    async def usable(self) -> list[str]:
        """Addresses to choose from: those that did not fail just now, or all if all did.

        Raises:
            NoAnswerError: there is none.
        """
        await self._refresh()
        if not self._channels:
            raise NoAnswerError("no cache service is registered; start one with `qaq originals`")
        now = time.monotonic()
        good = [address for address in self._channels if self._avoided.get(address, now) <= now]
        return good or list(self._channels)

    def stub(self, address: str) -> originals_pb2_grpc.OriginalsStub:
        return originals_pb2_grpc.OriginalsStub(self._channels[address])

    def avoid(self, address: str) -> None:
        """Prefers other replicas for a few seconds: this one did not answer."""
        self._avoided[address] = time.monotonic() + AVOID_S

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))
        self._channels.clear()

    async def _refresh(self) -> None:
        async with self._refreshing:
            if time.monotonic() - self._found_at < REFRESH_S:
                return
            try:
                found = set(await self._find())
            except RedisError as error:
                # Those known so far may well be alive.
                metrics.registry_failures.inc()
                if once("finding cache services"):
                    log.warning("the list of cache services is not to be had; keeping the last", error=str(error))
                found = set(self._channels)
            self._found_at = time.monotonic()
            for address in found - self._channels.keys():
                self._channels[address] = open_channel(address)
            for address in self._channels.keys() - found:
                self._avoided.pop(address, None)
                task = asyncio.create_task(self._channels.pop(address).close(_CLOSE_GRACE_S))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)


def choose(page_id: bytes, addresses: Sequence[str]) -> str:
    """Rendezvous hashing: when one address goes, only its pages move."""
    if len(addresses) == 1:
        return addresses[0]
    return max(addresses, key=lambda address: blake3(page_id + address.encode()).digest(8))
