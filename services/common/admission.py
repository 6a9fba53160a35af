"""Admission control: a bounded queue in front of what does the work, fair between tenants."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from prometheus_client import Gauge, Histogram

from services.common import tracing
from services.common.errors import ResourceExhausted

RETRY_AFTER_MS = 2000


@dataclass
class _Waiter:
    """What waits, and the number of slots that it takes."""

    slots: int
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """Admits as many requests as can be served at once. The others wait.

    Free slots go to the tenants in round-robin order, one request each, so a tenant with many requests waits behind
    its own. When the queue is full, a request of a tenant with fewer that wait replaces the latest one of the tenant
    with the most, which is refused.

    Args:
        max_waiting: requests that may wait.
        capacity: returns the number of slots that there are now: sequences that all workers together can run, threads.
        of: what waits, for messages.
        depth: says how many wait, here and in other queues. waited: observes for how many seconds.
    """

    def __init__(
        self,
        max_waiting: int,
        capacity: Callable[[], int],
        of: str = "generations",
        depth: Gauge | None = None,
        waited: Histogram | None = None,
    ) -> None:
        self._max_waiting, self._capacity, self._of = max_waiting, capacity, of
        self._depth, self._waited = depth, waited
        self._taken = self._told = 0
        # By tenant, in round-robin order.
        self._queues: OrderedDict[str, deque[_Waiter]] = OrderedDict()

    @property
    def taken(self) -> int:
        """Slots that are held."""
        return self._taken

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    def check(self, tenant: str) -> None:
        """Raises:
        ResourceExhausted: the queue is full, and no other tenant has more that wait.
        """
        if self.waiting >= self._max_waiting and self._crowding(tenant) is None:
            raise self._full()

    @contextlib.asynccontextmanager
    async def place(self, tenant: str, slots: int, timeout_s: float) -> AsyncIterator[None]:
        """Waits for free slots and holds them while the context lasts.

        Args:
            slots: how many it takes.
            timeout_s: longest time to wait.
        Raises:
            ResourceExhausted: the queue is full.
            TimeoutError: not enough slots became free in time.
        """
        arrived = time.monotonic()
        if self._queues or not self._fits(slots):
            with tracing.span("queue", of=self._of):
                await self._wait(tenant, slots, timeout_s)
        else:
            self._taken += slots
        if self._waited is not None:
            self._waited.observe(time.monotonic() - arrived)
        try:
            yield
        finally:
            self._taken -= slots
            self.wake()

    def wake(self) -> None:
        """Admits those that fit. To be called when slots may have become free."""
        while self._queues:
            tenant, queue = next(iter(self._queues.items()))
            if not self._fits(queue[0].slots):
                break
            waiter = queue.popleft()
            self._queues.move_to_end(tenant)
            self._tidy(tenant)
            if waiter.turn.done():  # cancelled in this turn of the loop: its task has not removed it yet
                continue
            self._taken += waiter.slots
            waiter.turn.set_result(None)

    async def _wait(self, tenant: str, slots: int, timeout_s: float) -> None:
        if self.waiting >= self._max_waiting:
            self._refuse_one_for(tenant)
        waiter = _Waiter(slots)
        self._queues.setdefault(tenant, deque()).append(waiter)
        self._tell()
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.turn
        except BaseException:
            if waiter in self._queues.get(tenant, ()):
                self._queues[tenant].remove(waiter)
                self._tidy(tenant)
            elif waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._taken -= slots  # admitted and cancelled at the same moment: the next one gets the slots
            self.wake()
            raise

    def _fits(self, slots: int) -> bool:
        return self._taken == 0 or self._taken + slots <= self._capacity()

    def _crowding(self, tenant: str) -> str | None:
        """The tenant whose latest generation this tenant's request replaces in a full queue; None if there is none."""
        longest = max(self._queues, key=lambda name: len(self._queues[name]), default=None)
        mine = len(self._queues.get(tenant, ()))
        return longest if longest is not None and len(self._queues[longest]) > mine + 1 else None

    def _refuse_one_for(self, tenant: str) -> None:
        crowding = self._crowding(tenant)
        if crowding is None:
            raise self._full()
        latest = self._queues[crowding].pop()
        self._tidy(crowding)
        if not latest.turn.done():  # else it was cancelled in this turn of the loop
            latest.turn.set_exception(self._full())

    def _full(self) -> ResourceExhausted:
        return ResourceExhausted(
            f"{self.waiting} {self._of} wait already, the most that are queued here; try again later",
            retry_after_ms=RETRY_AFTER_MS,
        )

    def _tidy(self, tenant: str) -> None:
        if not self._queues[tenant]:
            del self._queues[tenant]
        self._tell()

    def _tell(self) -> None:
        if self._depth is not None:
            self._depth.inc(self.waiting - self._told)
            self._told = self.waiting
