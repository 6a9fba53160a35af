"""The replicas of the cache service: discovery, choice, and calls that try another replica after a failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc
import structlog
from blake3 import blake3
from qaq.v1 import originals_pb2_grpc
from redis.exceptions import RedisError

from qaq_core.base.errors import OriginalsError
from services.common import metrics
from services.common.channel import Dial, open_channel
from services.common.errors import InvalidArgument, StatusError
from services.common.log import once

T = TypeVar("T")
Finder = Callable[[], Awaitable[Sequence[str]]]
Stub = originals_pb2_grpc.OriginalsStub

REFRESH_S = 1.0
AVOID_S = 5.0
TRIES = 2
_CLOSE_GRACE_S = 60.0  # above every deadline, so that running calls can end
_NOT_RUNNING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
# What grpc.aio itself says of a call that its server ended while a message was sent: what the server said is lost.
_UNTOLD = (grpc.StatusCode.INTERNAL, "Internal error from Core")
_RETRYABLE = (*_NOT_RUNNING, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)

log = structlog.get_logger()


class NoAnswerError(OriginalsError):
    """No cache service answers, or the one that does is full. The call may succeed later."""


class CodecUnknownError(OriginalsError):
    """The cache service does not have the quantizer; PutCodec must come first."""


class Replicas:
    """Channels to the replicas that `find` lists. Belongs to one event loop."""

    def __init__(self, find: Finder, dial: Dial = open_channel) -> None:
        self._find, self._dial = find, dial
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._avoided: dict[str, float] = {}
        self._found_at = -REFRESH_S
        self._refreshing = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    async def call(self, key: bytes, call: Callable[[Stub], Awaitable[T]], tries: int = TRIES) -> T:
        """Calls the replica that `key` belongs to, and another one if that one is not running. A call whose answer was
        lost is made again.

        Raises:
            OriginalsError: names the replica and the reason.
        """
        for left in reversed(range(tries)):
            address = choose(key, await self.usable())
            try:
                answer = await call(Stub(self._channels[address]))
                if answer is None:  # what gRPC makes of bytes that are no message
                    raise InvalidArgument("it is no message of this protocol")
                return answer
            except grpc.aio.AioRpcError as error:
                if error.code() in _NOT_RUNNING:
                    self._avoided[address] = time.monotonic() + AVOID_S
                if left and (error.code() in _NOT_RUNNING or _untold(error)):
                    continue
                raise _translated(address, error) from error
            except StatusError as error:  # from the checks of `wire`
                raise OriginalsError(f"cache service {address} sent a broken answer: {error}") from error
        raise AssertionError("unreachable: the last try returns or raises")

    async def usable(self) -> list[str]:
        """Addresses of the replicas that have not failed in the last seconds, or of all if all have.

        Raises:
            NoAnswerError: there is none.
        """
        await self._refresh()
        if not self._channels:
            raise NoAnswerError("no cache service is registered; start one with `qaq originals`")
        now = time.monotonic()
        good = [address for address in self._channels if self._avoided.get(address, now) <= now]
        return good or list(self._channels)

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
                # The known replicas may still run.
                metrics.registry_failures.inc()
                if once("finding cache services"):
                    log.warning("cannot list the cache services; keeping the last list", error=str(error))
                found = set(self._channels)
            self._found_at = time.monotonic()
            for address in found - self._channels.keys():
                self._channels[address] = self._dial(address)
            for address in self._channels.keys() - found:
                self._avoided.pop(address, None)
                task = asyncio.create_task(self._channels.pop(address).close(_CLOSE_GRACE_S))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)


def choose(page_id: bytes, addresses: Sequence[str]) -> str:
    """Rendezvous hashing: when a replica leaves, only its own pages move to others."""
    if len(addresses) == 1:
        return addresses[0]
    return max(addresses, key=lambda address: blake3(page_id + address.encode()).digest(8))


def _untold(error: grpc.aio.AioRpcError) -> bool:
    return (error.code(), error.details()) == _UNTOLD


def _translated(address: str, error: grpc.aio.AioRpcError) -> OriginalsError:
    code = error.code()
    message = f"cache service {address}: {code.name}: {error.details()}"
    if code in _RETRYABLE or _untold(error):
        return NoAnswerError(message)
    return CodecUnknownError(message) if code is grpc.StatusCode.FAILED_PRECONDITION else OriginalsError(message)
