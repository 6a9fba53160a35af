"""The router that the gateway talks to: a named one, or one of those that are registered."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator

import grpc
from qaq.v1 import generate_pb2_grpc
from redis.asyncio import Redis

from services.common.channel import open_channel
from services.common.errors import Unavailable
from services.common.registry import Registry

RETRY_AFTER_MS = 2000


class Routers:
    """A channel to one router, and to another once that one is gone.

    Args:
        address: host:port; None looks in the registry.
    """

    def __init__(self, redis: Redis, address: str | None) -> None:
        self._registry, self._fixed = Registry(redis), address
        self._address = ""
        self._channel: grpc.aio.Channel | None = None

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator[generate_pb2_grpc.InferenceStub]:
        """A client of a router, for one call.

        Raises:
            Unavailable: none is registered.
        """
        if self._channel is None:
            self._address = self._fixed or await self._find()
            self._channel = open_channel(self._address)
        channel = self._channel
        try:
            yield generate_pb2_grpc.InferenceStub(channel)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and channel is self._channel and not self._fixed:
                self._channel = None  # the next call looks again; those that run keep this one
            raise

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def _find(self) -> str:
        members = await self._registry.members("router")
        if not members:
            raise Unavailable(
                "no router is registered; start one with `qaq router`", retry_after_ms=RETRY_AFTER_MS
            )
        return random.choice(members).address
