from __future__ import annotations

import asyncio
import contextlib

import pytest

from services.common.tasks import end


async def test_a_task_that_loses_a_cancellation_ends() -> None:
    async def loses_one() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    task = asyncio.create_task(loses_one())
    await asyncio.sleep(0)
    await asyncio.wait_for(end(task), 30)
    assert task.cancelled()


async def test_the_error_of_a_task_is_raised() -> None:
    async def fails() -> None:
        raise ValueError("lost")

    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="lost"):
        await end(task)
