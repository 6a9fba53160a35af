"""The routers that a client may talk to: one of them at a time, and another once that one is gone."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import grpc
from qaq.v1 import generate_pb2_grpc
from redis.asyncio import Redis

from services.common.channel import open_channel
from services.common.errors import Unavailable
from services.common.registry import Registry

RETRY_AFTER_MS = 2000
CONNECT_TIMEOUT_S = 5.0

Find = Callable[[], Awaitable[Sequence[str]]]
"""Addresses, those to try first in front."""


def named(addresses: str) -> Find:
    """Routers that are listed by comma, in that order."""
    listed = [address.strip() for address in addresses.split(",")]

    async def find() -> Sequence[str]:
        return listed

    return find


def registered(redis: Redis) -> Find:
    """Those that are there, in random order, so that clients spread.

    Raises:
        Unavailable: none is.
    """
    registry = Registry(redis)

    async def find() -> Sequence[str]:
        addresses = [member.address for member in await registry.members("router")]
        if not addresses:
            raise Unavailable("no router is registered; start one with `qaq router`", retry_after_ms=RETRY_AFTER_MS)
        return random.sample(addresses, len(addresses))

    return find


class Routers:
    """A channel to one of several routers.

    Args:
        find: `named` or `registered`.
    """

    def __init__(self, find: Find) -> None:
        self._find = find
        self._address = self._lost = ""
        self._channel: grpc.aio.Channel | None = None
        self._opening = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator[generate_pb2_grpc.InferenceStub]:
        """A client of a router that is there, for one call.

        Raises:
            Unavailable: none is.
        """
        async with self._opening:
            if self._channel is None or not await _answers(self._channel):
                self._channel = await self._open()
        channel, address = self._channel, self._address
        try:
            yield generate_pb2_grpc.InferenceStub(channel)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and channel is self._channel:
                self._channel, self._lost = None, address  # calls that run keep this one
            raise

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def _open(self) -> grpc.aio.Channel:
        """A channel to the first that answers; the one that was lost is the last to be asked."""
        addresses = sorted(await self._find(), key=lambda address: address == self._lost)
        for self._address in addresses:
            channel = open_channel(self._address)
            if await _answers(channel):
                return channel
            await channel.close()
        raise Unavailable(
            f"no router answers at {', '.join(addresses)}; start one with `qaq up` or `qaq router`, or name "
            "others (QAQ_ROUTER)",
            retry_after_ms=RETRY_AFTER_MS,
        )


async def _answers(channel: grpc.aio.Channel) -> bool:
    """Whether it is connected, or can be at once."""
    waiting = (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            while (state := channel.get_state(try_to_connect=True)) in waiting:
                await channel.wait_for_state_change(state)
            return state is grpc.ChannelConnectivity.READY
    return False
