"""The inbox: what other threads ask of the engine's thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future

from qaq_core import Originals
from services.common.errors import ResourceExhausted, Unavailable
from services.common.settings import WorkerSettings
from services.worker.generation import Generation

RETRY_AFTER_MS = 1000


class RequestQueue:
    """Generations that wait, sessions to drop, and whether to stop. Any thread may ask, the engine's answers.

    Args:
        originals: what waits to be stored there may become too much to take anything new.
    """

    def __init__(self, originals: Originals, settings: WorkerSettings) -> None:
        self._originals, self._settings = originals, settings
        self._wake = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._drops: list[tuple[str, Future[bool]]] = []
        self._stopping = self._draining = False

    def __len__(self) -> int:
        """Generations that wait."""
        return len(self._waiting)

    @property
    def staging_full(self) -> bool:
        return self._originals.pending_bytes > self._settings.staging_budget_bytes

    # -- for any thread --------------------------------------------------------------------------------

    def put(self, generation: Generation, free: Callable[[], int]) -> None:
        """Queues a generation.

        Args:
            free: tells how many places those who wait now will take.
        Raises:
            Unavailable: nothing new is taken any more.
            ResourceExhausted: too many wait already, or too many originals.
        """
        with self._wake:
            if self._stopping or self._draining:
                raise Unavailable("this worker is stopping; send the request again", retry_after_ms=RETRY_AFTER_MS)
            if self.staging_full:
                raise ResourceExhausted(
                    f"{self._originals.pending_bytes:,} bytes of originals wait for a cache service, more than "
                    "QAQ_STAGING_BUDGET_BYTES; try again later, and look whether cache services and Redis run",
                    retry_after_ms=RETRY_AFTER_MS,
                )
            if len(self._waiting) >= self._settings.max_waiting + free():
                raise ResourceExhausted(
                    f"{len(self._waiting)} generations wait already; try again later",
                    retry_after_ms=RETRY_AFTER_MS,
                )
            self._waiting.append(generation)
            self._wake.notify()

    def cancel(self, generation: Generation) -> None:
        with self._wake:
            generation.listener.cancelled = True
            self._wake.notify()

    def drop(self, session_id: str) -> Future[bool]:
        answer: Future[bool] = Future()
        with self._wake:
            if self._stopping:
                answer.set_result(False)
                return answer
            self._drops.append((session_id, answer))
            self._wake.notify()
        return answer

    def close(self) -> None:
        """Takes no generation from now on."""
        with self._wake:
            self._draining = True

    def stop(self) -> None:
        """Asks the engine's thread to end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    # -- for the engine's thread -----------------------------------------------------------------------

    def wait(self, busy: bool) -> bool:
        """Waits until there is something to do, not at all if `busy`; False when the engine is to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._drops or self._waiting or busy)
            return not self._stopping

    def pause(self, seconds: float) -> None:
        """Waits so long, or until somebody asks for something."""
        with self._wake:
            self._wake.wait(seconds)

    def first(self, busy: Collection[str]) -> Generation | None:
        """The generation that waited for longest and whose session is not busy."""
        with self._wake:
            return next((g for g in self._waiting if g.request.session_id not in busy), None)

    def remove(self, generation: Generation) -> None:
        with self._wake:
            self._waiting.remove(generation)

    def forget_cancelled(self) -> None:
        with self._wake:
            self._waiting = deque(g for g in self._waiting if not g.cancelled)

    def take_waiting(self) -> list[Generation]:
        """Everything that waits; nothing does after this."""
        with self._wake:
            waiting, self._waiting = self._waiting, deque()
            return list(waiting)

    def take_drops(self) -> list[tuple[str, Future[bool]]]:
        with self._wake:
            drops, self._drops = self._drops, []
            return drops
