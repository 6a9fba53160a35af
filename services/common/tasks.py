"""The end of background tasks."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

CANCEL_AGAIN_S = 0.5

log = structlog.get_logger()


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits for its end. It is cancelled again if it went on: Redis' client, for one, may suppress
    a cancellation that arrives while a command ends.

    An error that the task has failed with is logged and not raised: nobody could act on it here, and what the caller
    cleans up next has to be cleaned up all the same.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_AGAIN_S)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a background task had failed", task=task.get_name(), error=repr(error))
