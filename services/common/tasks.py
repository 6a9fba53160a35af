"""The end of background tasks."""

from __future__ import annotations

import asyncio
from typing import Any

CANCEL_AGAIN_S = 0.5


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits for its end. It is cancelled again if it went on: Redis' client, for one, may suppress
    a cancellation that arrives while a command ends."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_AGAIN_S)
