from __future__ import annotations

import asyncio

from services.common.tasks import ended


async def test_a_task_that_suppresses_a_cancellation_ends() -> None:
    suppressed = 0

    async def stubborn() -> None:
        nonlocal suppressed
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                suppressed += 1
                if suppressed == 2:
                    raise

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await ended(task)
    assert task.cancelled()
    await ended(task)
    assert suppressed == 2


async def test_a_task_that_has_failed() -> None:
    async def fail() -> None:
        raise ValueError

    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await ended(task)
    assert isinstance(task.exception(), ValueError)
