"""The end of a task that runs in the background."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

CANCEL_AGAIN_S = 1.0


async def end(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits for its end; raises the error that it ends with.

    The cancellation is repeated: one that arrives while Redis' client reads an answer may be lost.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_AGAIN_S)
    with contextlib.suppress(asyncio.CancelledError):
        await task
