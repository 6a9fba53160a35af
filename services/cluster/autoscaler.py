"""How many workers a model gets: more while its queue does not empty or memory is short, fewer after it was idle."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from services.cluster.fleet import Fleet
from services.cluster.state import StackError

LOOK_S = 1.0
"""Between two looks at the load."""
QUEUE_S = 3.0
"""For so long generations must wait, or all workers be short of memory, before there is another worker."""
RETRY_S = 60.0
"""After a change that failed, as where no GPU is free."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Load:
    """The load of a model's workers.

    Attributes:
        workers: that serve.
        waiting, running: generations, those in the router's queue included.
        places: sequences that all of them decode at once.
        short: workers whose caches have given up bits, or more, for want of memory.
    """

    workers: int
    waiting: int
    running: int
    places: int
    short: int = 0


class Stack(Protocol):
    """What can be scaled, see `Launcher`."""

    @property
    def elastic(self) -> list[Fleet]: ...

    def load(self, fleet: Fleet) -> Load: ...

    def resize(self, fleet: Fleet, workers: int) -> None: ...


class Autoscaler:
    """Decides about one model, in one look after the other.

    Args:
        idle_s: seconds for which the work must have fitted half the places of one worker less.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._wanted = 0
        self._short_since: float | None = None
        self._idle_since: float | None = None

    def decide(self, least: int, most: int, wanted: int, load: Load, now: float) -> tuple[int, str]:
        """The number of workers from now on, and why it is another one.

        Args:
            least, most: bounds of the number.
            wanted: the number until now.
            now: seconds of a clock that does not go back.
        """
        if wanted != self._wanted:  # somebody has changed it: what was seen before says nothing
            self._wanted, self._short_since, self._idle_since = wanted, None, None
        if not least <= wanted <= most:
            return min(max(wanted, least), most), "the bounds have changed"
        if load.workers < wanted:  # one starts, or starts again
            self._short_since = self._idle_since = None
            return wanted, ""
        each = max(1.0, load.places / load.workers)
        starved = 0 < load.workers == load.short and load.running > 0
        idle = not load.waiting and not load.short and load.running <= (wanted - 1) * each / 2
        self._short_since = _since(self._short_since, now, bool(load.waiting) or starved)
        self._idle_since = _since(self._idle_since, now, idle)
        if wanted < most and self._short_since is not None and now - self._short_since >= QUEUE_S:
            more = max(1, math.ceil(load.waiting / each))
            why = f"{load.waiting} generations wait" if load.waiting else "all workers are short of memory"
            return min(wanted + more, most), why
        if wanted > least and self._idle_since is not None and now - self._idle_since >= self._idle_s:
            return wanted - 1, f"{load.running} generations run, for {self._idle_s:g} s not more than fit fewer workers"
        return wanted, ""


def _since(before: float | None, now: float, holds: bool) -> float | None:
    """Since when something holds."""
    return None if not holds else now if before is None else before


class Autoscaling:
    """Scales the models of a stack that have bounds.

    Args:
        change: does something while nothing else changes the stack.

    Attributes:
        last: by the name of a model, what was changed last and why.
    """

    def __init__(self, stack: Stack, change: Callable[[Callable[[], Any]], Any]) -> None:
        self._stack, self._change = stack, change
        self._scalers: dict[str, Autoscaler] = {}
        self._not_before: dict[str, float] = {}
        self.last: dict[str, str] = {}

    def run(self) -> None:
        """Looks for ever."""
        while True:
            time.sleep(LOOK_S)
            try:
                self.look(time.monotonic())
            except Exception as error:  # Ray may be gone for a while
                log.warning("the load of the workers is not known", reason=str(error)[:200])
                time.sleep(RETRY_S)

    def look(self, now: float) -> None:
        """Looks at the load once, and changes what it asks for."""
        for fleet in self._stack.elastic:
            if now < self._not_before.get(fleet.name, 0.0):
                continue
            scaler = self._scalers.setdefault(fleet.name, Autoscaler(fleet.served.idle_s))
            wanted, load = fleet.served.workers, self._stack.load(fleet)
            workers, why = scaler.decide(fleet.least, fleet.most, wanted, load, now)
            if workers == wanted:
                continue

            def resize(fleet: Fleet = fleet, workers: int = workers, wanted: int = wanted) -> bool:
                if fleet.served.workers != wanted:  # a command was faster
                    return False
                self._stack.resize(fleet, workers)
                return True

            try:
                done = self._change(resize)
            except StackError as error:
                self._not_before[fleet.name] = now + RETRY_S
                self.last[fleet.name] = f"no {workers} workers: {error}"
                log.error("the workers of a model cannot be scaled", model=fleet.name, reason=str(error))
                continue
            if done:
                self.last[fleet.name] = f"{wanted} to {workers} workers: {why}"
                log.info("scaled", model=fleet.name, workers=workers, before=wanted, why=why)
