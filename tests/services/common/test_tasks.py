from __future__ import annotations

import asyncio

from structlog.testing import capture_logs

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


async def test_a_failed_task_is_told_of_and_the_caller_goes_on() -> None:
    async def fail() -> None:
        raise ValueError("no more")

    async def fail_when_cancelled() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            raise ValueError("in its clean-up")

    for work, message in ((fail, "no more"), (fail_when_cancelled, "in its clean-up")):
        task = asyncio.create_task(work(), name="work")
        await asyncio.sleep(0)
        with capture_logs() as logs:
            await ended(task)
        (told,) = logs
        assert (told["log_level"], told["task"]) == ("error", "work")
        assert message in told["error"]
