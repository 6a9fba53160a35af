"""The queue in front of the workers: bounded, in turns over tenants, and left by whoever gives up."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from services.common import metrics
from services.common.errors import ResourceExhausted

RETRY_AFTER_MS = 2000


@dataclass
class _Waiter:
    """A generation that waits, with the sequences it will take."""

    slots: int
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """Lets as many generations go to the workers as they can run at once; the others wait here.

    A place that becomes free goes to the next tenant, one generation each in turn, so that a tenant who
    sends many waits behind his own. When the queue is full, a tenant with fewer waiting generations takes the
    place of the one with most, whose latest is refused.

    Args:
        most: generations that may wait.
        capacity: sequences that all workers together run at once, as far as is known now; asked every time.
    """

    def __init__(self, most: int, capacity: Callable[[], int]) -> None:
        self._most, self._capacity = most, capacity
        self._taken = 0
        # In the order of their turns.
        self._queues: OrderedDict[str, deque[_Waiter]] = OrderedDict()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    def check(self, tenant: str) -> None:
        """Raises:
        ResourceExhausted: the queue is full, and this tenant's share of it used up.
        """
        if self.waiting >= self._most and self._crowding(tenant) is None:
            raise self._full()

    @contextlib.asynccontextmanager
    async def place(self, tenant: str, slots: int, timeout_s: float) -> AsyncIterator[None]:
        """A place with the workers, held while the context lasts.

        Args:
            slots: sequences that the generation takes.
            timeout_s: how long to wait for it.
        Raises:
            ResourceExhausted: the queue is full.
            TimeoutError: no place became free in time.
        """
        if self._queues or not self._fits(slots):
            await self._wait(tenant, slots, timeout_s)
        else:
            self._taken += slots
        try:
            yield
        finally:
            self._taken -= slots
            self.wake()

    def wake(self) -> None:
        """Gives out what places there are. Call it when there may be more."""
        while self._queues:
            tenant, queue = next(iter(self._queues.items()))
            if not self._fits(queue[0].slots):
                break
            waiter = queue.popleft()
            self._queues.move_to_end(tenant)
            self._tidy(tenant)
            self._taken += waiter.slots
            waiter.turn.set_result(None)

    async def _wait(self, tenant: str, slots: int, timeout_s: float) -> None:
        if self.waiting >= self._most:
            self._refuse_one_for(tenant)
        waiter = _Waiter(slots)
        self._queues.setdefault(tenant, deque()).append(waiter)
        metrics.queue_depth.set(self.waiting)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.turn
        except BaseException:
            if waiter in self._queues.get(tenant, ()):
                self._queues[tenant].remove(waiter)
                self._tidy(tenant)
            elif waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._taken -= slots  # the place came at the moment of giving up: it is the next one's
            self.wake()
            raise

    def _fits(self, slots: int) -> bool:
        return self._taken == 0 or self._taken + slots <= self._capacity()

    def _crowding(self, tenant: str) -> str | None:
        """A tenant who has to give way to this one in a full queue."""
        longest = max(self._queues, key=lambda name: len(self._queues[name]), default=None)
        mine = len(self._queues.get(tenant, ()))
        return longest if longest is not None and len(self._queues[longest]) > mine + 1 else None

    def _refuse_one_for(self, tenant: str) -> None:
        crowding = self._crowding(tenant)
        if crowding is None:
            raise self._full()
        latest = self._queues[crowding].pop()
        self._tidy(crowding)
        latest.turn.set_exception(self._full())

    def _full(self) -> ResourceExhausted:
        return ResourceExhausted(
            f"{self.waiting} generations wait already, the most this router takes; try again later",
            retry_after_ms=RETRY_AFTER_MS,
        )

    def _tidy(self, tenant: str) -> None:
        if not self._queues[tenant]:
            del self._queues[tenant]
        metrics.queue_depth.set(self.waiting)
