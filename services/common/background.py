"""An event loop in a daemon thread, for async work under a synchronous caller."""

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
        closed: makes the error of work that `close` ended or that came after it.
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
        with self._guard:  # so that nothing is submitted after `close` has counted what runs
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(self._ended_by_close(work), self._loop)
        work.close()
        future: Future[T] = Future()
        future.set_exception(self._error())
        return future

    def close(self, clean_up: Callable[[], Awaitable[None]]) -> None:
        """Cancels what runs, awaits `clean_up` on the loop and ends the thread. Again does nothing.

        Work and `clean_up` that have not ended after `CLOSE_S` are logged and left.
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
        await asyncio.sleep(0)  # lets what was submitted last begin, so that it can say why it ended
        running = asyncio.all_tasks() - {asyncio.current_task()}
        try:
            async with asyncio.timeout(CLOSE_S):
                while running:
                    for task in running:
                        task.cancel()  # once more, if what the task waited for swallowed it
                    _, running = await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
                await clean_up()
        except TimeoutError:
            log.error("work has not ended; going on without it", tasks=[str(task) for task in running])
