"""Work in threads, a few pieces at a time, in turns of the tenants."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from services.common import metrics
from services.common.admission import Admission
from services.common.errors import ResourceExhausted

T = TypeVar("T")


class LateError(TimeoutError):
    """A piece of work has not ended in time. Its thread goes on: nothing can stop it."""


class Turns:
    """Threads for work that would hold up the event loop. Tenants take turns, so that one with much work waits behind
    its own.

    Work whose caller has gone away is left out, unless it has begun: then it keeps its turn until it ends. Work that
    takes longer than `limit_s` loses its turn, and another piece begins beside it. When `most_late` pieces are late,
    nothing begins before one of them ends.

    Attributes:
        late: pieces that are late.

    Args:
        of: what the pieces are, for messages.
        at_once: pieces that run at a time.
        max_waiting: pieces that may wait for their turn.
        limit_s: longest time to wait for a turn, and longest time that the work may take.
        most_late: pieces that may be late.
    """

    def __init__(self, of: str, at_once: int, max_waiting: int, limit_s: float, most_late: int = 2) -> None:
        self._of, self._limit_s, self._most_late = of, limit_s, most_late
        self._admission = Admission(max_waiting, lambda: at_once, of)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.late = 0

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns, in a thread.

        Raises:
            ResourceExhausted: too many pieces wait, or are late.
            LateError: it takes too long. TimeoutError: its turn did not come.
        """
        begun = False

        async def turn() -> T:
            nonlocal begun
            async with self._admission.place(tenant, 1, self._limit_s):
                self._check()
                begun = True
                return await self._in_time(work)

        self._check()
        task = asyncio.create_task(turn(), name=f"turn of {self._of}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not begun:
                task.cancel()
            raise

    def _check(self) -> None:
        if self.late >= self._most_late:
            raise ResourceExhausted(
                f"{self.late} {self._of} have taken longer than {self._limit_s:g} s and have not ended; until one of "
                "them does, no other begins here: try another server, or again later",
                retry_after_ms=round(1000 * self._limit_s),
            )

    async def _in_time(self, work: Callable[[], T]) -> T:
        result = _started(work, self._of)
        try:
            async with asyncio.timeout(self._limit_s):
                return await asyncio.shield(result)
        except TimeoutError as error:
            if result.done():  # it has raised this itself
                raise
            self.late += 1
            metrics.late_work.labels(self._of).inc()
            result.add_done_callback(self._late_ended)
            raise LateError(f"it takes longer than {self._limit_s:g} s") from error

    def _late_ended(self, result: asyncio.Future[Any]) -> None:
        self.late -= 1
        if not result.cancelled():
            result.exception()  # nobody else asks for it

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have gone away


def _started(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """The result of work that has begun. A daemon thread, so that work which never ends does not keep the process."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.done():  # the loop is ending
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value: T | None = None
        error: Exception | None = None
        try:
            value = work()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result
