"""Another program's keys, which fill Redis."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from services.common.tasks import ended

PREFIX = "junk:"
_numbers = itertools.count()


@contextlib.asynccontextmanager
async def filled(redis: Redis) -> AsyncIterator[None]:
    """Keeps Redis full while the context lasts; then its memory is free again."""
    await _fill(redis)
    filling = asyncio.create_task(_keep_filling(redis))
    try:
        yield
    finally:
        await ended(filling)
        await redis.delete(*[key async for key in redis.scan_iter(f"{PREFIX}*", count=10_000)])


async def _keep_filling(redis: Redis) -> None:
    while True:
        await asyncio.sleep(0.05)
        await _fill(redis)


async def _fill(redis: Redis) -> None:
    """Writes until Redis refuses the smallest value."""
    for size in (1 << 18, 1 << 14, 1 << 10, 1):
        with contextlib.suppress(OutOfMemoryError):
            while True:
                await redis.set(f"{PREFIX}{next(_numbers)}", bytes(size))


async def refused(call: Callable[[], Awaitable[Any]]) -> grpc.aio.AioRpcError:
    """The error of a call that may succeed before: a full Redis has a little room again and again."""
    for _ in range(1000):
        try:
            await call()
        except grpc.aio.AioRpcError as error:
            return error
    pytest.fail("it was never refused")
