"""The routers that a client can use: one at a time, and another one when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import grpc
from qaq.v1 import generate_pb2_grpc, inspect_pb2_grpc
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.addresses import check_addresses
from services.common.channel import Dial, open_channel
from services.common.errors import Unavailable
from services.common.registry import Registry

RETRY_AFTER_MS = 2000
CONNECT_TIMEOUT_S = 5.0

Find = Callable[[], Awaitable[Sequence[str]]]
"""Returns addresses in the order in which to try them."""


def named(addresses: str) -> Find:
    """The routers of a comma-separated list, in that order.

    Raises:
        ConfigError: one is not host:port.
    """
    listed = check_addresses(addresses)

    async def find() -> Sequence[str]:
        return listed

    return find


def registered(redis: Redis) -> Find:
    """The registered routers, in random order, which balances the clients. While Redis does not answer, those that
    were found last.

    Raises:
        Unavailable: none is registered, or Redis has not answered yet.
    """
    registry = Registry(redis)
    addresses: list[str] = []

    async def find() -> Sequence[str]:
        nonlocal addresses
        try:
            addresses = [member.address for member in await registry.members("router")]
        except RedisError as error:
            if not addresses:
                raise Unavailable(
                    "the routers cannot be listed because Redis does not answer; check that it runs and that "
                    "QAQ_REDIS_URL is right",
                    retry_after_ms=RETRY_AFTER_MS,
                ) from error
        if not addresses:
            raise Unavailable(
                "no router is registered; start a stack with `qaq up`, or one alone with `qaq router`, or try again",
                retry_after_ms=RETRY_AFTER_MS,
            )
        return random.sample(addresses, len(addresses))

    return find


class Routers:
    """A channel to one of several routers.

    Args:
        find: `named` or `registered`.
        dial: opens a channel to one.
    """

    def __init__(self, find: Find, dial: Dial = open_channel) -> None:
        self._find, self._dial = find, dial
        self._address = self._lost = ""
        self._channel: grpc.aio.Channel | None = None
        self._opening = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator[generate_pb2_grpc.InferenceStub]:
        """A client of a router that answers, for one call.

        Raises:
            Unavailable: no router answers.
        """
        async with self._answering() as channel:
            yield generate_pb2_grpc.InferenceStub(channel)

    @contextlib.asynccontextmanager
    async def inspector(self) -> AsyncIterator[inspect_pb2_grpc.InspectorStub]:
        """As `stub`, of the service that shows caches."""
        async with self._answering() as channel:
            yield inspect_pb2_grpc.InspectorStub(channel)

    @contextlib.asynccontextmanager
    async def _answering(self) -> AsyncIterator[grpc.aio.Channel]:
        async with self._opening:
            if self._channel is None or not await _answers(self._channel):
                self._channel = await self._open()
        channel, address = self._channel, self._address
        try:
            yield channel
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and channel is self._channel:
                self._channel, self._lost = None, address  # running calls keep this channel
            raise

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def _open(self) -> grpc.aio.Channel:
        """A channel to the first router that answers. The one that was lost is tried last."""
        addresses = sorted(await self._find(), key=lambda address: address == self._lost)
        for self._address in addresses:
            channel = self._dial(self._address)
            if await _answers(channel):
                return channel
            await channel.close()
        raise Unavailable(
            f"no router answers at {', '.join(addresses)}; start one with `qaq up` or `qaq router`, or set "
            "QAQ_ROUTER to another address",
            retry_after_ms=RETRY_AFTER_MS,
        )


async def _answers(channel: grpc.aio.Channel) -> bool:
    """Whether the channel is connected, or connects within `CONNECT_TIMEOUT_S`."""
    waiting = (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            while (state := channel.get_state(try_to_connect=True)) in waiting:
                await channel.wait_for_state_change(state)
            return state is grpc.ChannelConnectivity.READY
    return False
