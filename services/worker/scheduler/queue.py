"""The request queue: what other threads ask of the scheduler's thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, TypeVar

from qaq_core import Originals
from services.common.errors import ResourceExhausted, Unavailable
from services.common.settings import WorkerSettings
from services.worker.call import Call
from services.worker.generation import Generation
from services.worker.session_cache import Name, session_name

RETRY_AFTER_MS = 1000
MAX_WORK = 64

T = TypeVar("T")


class RequestQueue:
    """Waiting generations, sessions to drop, and the request to stop.

    Args:
        originals: the store; while too many bytes are on their way to it, no generation is accepted.
    """

    def __init__(self, originals: Originals, settings: WorkerSettings) -> None:
        self._originals, self._settings = originals, settings
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._drops: list[tuple[Name, Future[bool]]] = []
        self._work: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._stopping = self._draining = False

    def __len__(self) -> int:
        """The number of waiting generations."""
        return len(self._waiting)

    @property
    def staging_full(self) -> bool:
        return self._originals.pending_bytes > self._settings.staging_budget_bytes

    # -- for any thread --------------------------------------------------------------------------------

    def put(self, generation: Generation, free_slots: Callable[[], int]) -> None:
        """Queues a generation.

        Args:
            free_slots: returns the number of slots that waiting generations will take at the next step.
        Raises:
            Unavailable: the worker is draining or stopping.
            ResourceExhausted: the queue is full, or too many originals are pending.
        """
        with self._changed:
            if self._stopping or self._draining:
                raise Unavailable("this worker is stopping; send the request again", retry_after_ms=RETRY_AFTER_MS)
            if self.staging_full:
                raise ResourceExhausted(
                    f"{self._originals.pending_bytes:,} bytes of originals wait for a cache service, more than "
                    "QAQ_STAGING_BUDGET_BYTES; try again later, and check that the cache services and Redis run",
                    retry_after_ms=RETRY_AFTER_MS,
                )
            if len(self._waiting) >= self._settings.max_waiting + free_slots():
                raise ResourceExhausted(
                    f"{len(self._waiting)} generations wait already; try again later",
                    retry_after_ms=RETRY_AFTER_MS,
                )
            self._waiting.append(generation)
            self._changed.notify()

    def cancel(self, call: Call) -> None:
        with self._changed:
            call.cancelled = True
            self._changed.notify()

    def leave(self, call: Call) -> None:
        with self._changed:
            call.left = True
            self._changed.notify()

    def drop(self, name: Name) -> Future[bool]:
        """Asks for a session to be dropped; the future tells whether it existed."""
        dropped: Future[bool] = Future()
        with self._changed:
            if self._stopping:
                dropped.set_result(False)
                return dropped
            self._drops.append((name, dropped))
            self._changed.notify()
        return dropped

    def between_steps(self, work: Callable[[], T]) -> Future[T]:
        """Asks for something short to be done by the scheduler's thread between two steps.

        Raises:
            ResourceExhausted: much waits already.
            Unavailable: the worker is stopping.
        """
        done: Future[T] = Future()
        with self._changed:
            if self._stopping:
                raise Unavailable("this worker is stopping; try again", retry_after_ms=RETRY_AFTER_MS)
            if len(self._work) >= MAX_WORK:
                raise ResourceExhausted("too much waits for this worker; try again", retry_after_ms=RETRY_AFTER_MS)
            self._work.append((work, done))
            self._changed.notify()
        return done

    def close(self) -> None:
        """Accepts no generation from now on."""
        with self._changed:
            self._draining = True

    def stop(self) -> None:
        """Asks the scheduler's thread to end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    # -- for the scheduler's thread --------------------------------------------------------------------

    def wait_for_work(self, active: bool) -> bool:
        """Waits until there is something to do; returns at once if generations are active. False: stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._drops or self._work or self._waiting or active)
            return not self._stopping

    def sleep(self, seconds: float) -> None:
        """Waits for `seconds`, or until the queue changes."""
        with self._changed:
            self._changed.wait(seconds)

    def first(self, busy_sessions: Collection[Name]) -> Generation | None:
        """The oldest waiting generation whose session is not busy."""
        with self._changed:
            return next((g for g in self._waiting if session_name(g.request) not in busy_sessions), None)

    def of_sessions(self, names: Collection[Name]) -> list[Generation]:
        """The waiting generations of these sessions, in order of arrival."""
        with self._changed:
            return [g for g in self._waiting if session_name(g.request) in names]

    def remove(self, generation: Generation) -> None:
        with self._changed:
            self._waiting.remove(generation)

    def remove_cancelled(self) -> None:
        with self._changed:
            self._waiting = deque(g for g in self._waiting if not (g.cancelled or g.call.left))

    def take_all(self) -> list[Generation]:
        """Removes and returns all waiting generations."""
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
            return list(waiting)

    def take_work(self) -> list[tuple[Callable[[], Any], Future[Any]]]:
        """Removes and returns what is to be done between steps."""
        with self._changed:
            work, self._work = self._work, deque()
            return list(work)

    def take_drops(self) -> list[tuple[Name, Future[bool]]]:
        """Removes and returns the sessions to drop."""
        with self._changed:
            drops, self._drops = self._drops, []
            return drops
