"""Pauses: generations give way as a whole when their caches cannot give way any more.

Who came last is paused first and goes on last. It is paused between two tokens and its cache is freed; when there
is room again the cache is loaded from the store, its rest is computed, and the next token follows.
"""

from __future__ import annotations

import math
import time

import structlog

from services.common import metrics
from services.common.log import once
from services.worker.generation import Generation, age, session_of
from services.worker.scheduler.step import RunningBatch
from services.worker.sessions import Sessions

HEADROOM = 256
"""Tokens that a generation and all that run beside it must have room for when it goes on: if it were paused again
at once, the `prefix_rest` of its log would be computed for nothing."""

PATIENCE_S = 1.0
"""Pages may be under way to the store for so long before it counts as passing the budget."""

log = structlog.get_logger()


class Preemption:
    """Says who is paused and when they go on. Belongs to the engine's thread."""

    def __init__(self, batch: RunningBatch, sessions: Sessions) -> None:
        self._batch, self._sessions, self._memory = batch, sessions, sessions.memory
        self._counts_from: float | None = None

    def step(self) -> None:
        """Between two forward passes: pauses as many as bring the caches into the budget."""
        over = self._memory.short
        while over > 0:
            leaving = self._last()
            # Whose pages the store has not taken could not be loaded again: it may be down.
            if not leaving or not all(session_of(generation).stored for generation in leaving):
                self._pass(PATIENCE_S if leaving else 0.0)
                return
            over -= sum(session_of(generation).sequence.nbytes for generation in leaving)
            for generation in leaving:
                self._preempt(generation)
        self._counts_from = None

    def end_first(self) -> bool:
        """Lets the one that came first go on; False if there is no room for it.

        It goes on if nothing runs, whatever there is room for.
        """
        first, beside = self._batch.preempted[0], self._batch.running
        growth = sum(
            self._memory.growth(session_of(each).method, each.slots * min(each.left, HEADROOM))
            for each in (first, *beside)
        )
        need = session_of(first).needs + growth
        if not self._memory.fits(need, self._batch.sessions, self._sessions.cache) and beside:
            return False
        self._batch.resume(first)
        return True

    def _last(self) -> list[Generation]:
        """The choices of the call that came last among those that decode. One that is alone gives way choice by
        choice; the last one never does."""
        decoding = sorted(self._batch.decoding, key=age)
        if len(decoding) < 2:
            return []
        call = [generation for generation in decoding if generation.listener is decoding[-1].listener]
        return call if len(call) < len(decoding) else call[-1:]

    def _preempt(self, generation: Generation) -> None:
        self._batch.pause(generation)
        metrics.preempted.inc()
        if once("paused"):
            log.warning("the caches cannot give way; generations are paused", budget=self._memory.budget)

    def _pass(self, patience_s: float) -> None:
        """The caches are over the budget and stay so; counted once, until they are within it again."""
        now = time.monotonic()
        if self._counts_from is None:
            self._counts_from = now + patience_s
        if now < self._counts_from:
            return
        self._counts_from = math.inf
        metrics.kv_budget_exceeded.inc()
        if once("budget"):
            reason = "the store has not taken its pages" if patience_s else "nobody else decodes"
            log.warning(
                "the caches pass the budget and no generation can be paused",
                reason=reason,
                budget=self._memory.budget,
                over=self._memory.short,
            )
