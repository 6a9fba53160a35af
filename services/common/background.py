"""An event loop in a daemon thread, for asynchronous work of synchronous callers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import structlog

T = TypeVar("T")

CLOSE_S = 20.0
CANCEL_AGAIN_S = 1.0

log = structlog.get_logger()


class BackgroundLoop:
    """Runs coroutines for other threads until it is closed.

    Args:
        closed: makes the error of work that was running or submitted when the loop was closed.
    """

    def __init__(self, name: str, closed: Callable[[], Exception]) -> None:
        self._error = closed
        self._closed = False
        self._guard = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts work; returns at once."""
        with self._guard:  # nothing may be submitted after `close` has listed the running tasks
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(self._ended_by_close(work), self._loop)
        work.close()
        future: Future[T] = Future()
        future.set_exception(self._error())
        return future

    def close(self, clean_up: Callable[[], Awaitable[None]]) -> None:
        """Cancels the running work, awaits `clean_up` on the loop and ends the thread. A second call does nothing.

        Work and `clean_up` that have not ended after `CLOSE_S` are logged and abandoned.
        """
        with self._guard:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut(clean_up), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ended_by_close(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except asyncio.CancelledError:
            if self._closed:
                raise self._error() from None
            raise

    async def _shut(self, clean_up: Callable[[], Awaitable[None]]) -> None:
        await asyncio.sleep(0)  # the work submitted last must have begun to raise the right error
        running = asyncio.all_tasks() - {asyncio.current_task()}
        try:
            async with asyncio.timeout(CLOSE_S):
                while running:
                    for task in running:
                        task.cancel()  # again, if the task suppressed the first cancellation
                    _, running = await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
                await clean_up()
        except TimeoutError:
            log.error("work has not ended; it is abandoned", tasks=[str(task) for task in running])
