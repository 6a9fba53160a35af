"""Another program's keys, which fill Redis."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

PREFIX = "junk:"


async def fill(redis: Redis) -> None:
    """Writes until Redis refuses the smallest value."""
    number, size = 0, 1 << 20
    while size:
        try:
            await redis.set(f"{PREFIX}{number}", bytes(size))
            number += 1
        except OutOfMemoryError:
            size //= 4


async def free(redis: Redis) -> None:
    """Removes them."""
    await redis.delete(*[key async for key in redis.scan_iter(f"{PREFIX}*", count=10_000)])
