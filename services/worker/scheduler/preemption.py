"""Preemption: whole generations lose their caches when no λ brings the caches within the budget.

The generation that arrived last is preempted first and resumed last. It stops between two tokens and its cache is
freed. When there is room again, its pages are loaded from the store, the rest of its log is computed, and the stream
continues with the next token.
"""

from __future__ import annotations

import math
import time

import structlog

from services.common import metrics
from services.common.log import once
from services.worker.generation import Generation, arrival_order, session_of
from services.worker.scheduler.step import RunningBatch
from services.worker.sessions import Sessions

HEADROOM_TOKENS = 256
"""Tokens that a resumed generation and every running one must have room for. A generation that is preempted again at
once would compute the last `prefix_recompute_tokens` of its log for nothing."""

STORE_PATIENCE_S = 1.0
"""How long pages may be on their way to the store before the budget counts as exceeded."""

log = structlog.get_logger()


class Preemption:
    """Decides which generations are preempted and when they resume. Used by the scheduler's thread alone."""

    def __init__(self, batch: RunningBatch, sessions: Sessions) -> None:
        self._batch, self._sessions, self._memory = batch, sessions, sessions.memory
        self._exceeded_at: float | None = None

    def step(self) -> None:
        """Between two forward passes: preempts until the caches are within the budget."""
        excess = self._memory.excess_bytes
        while excess > 0:
            victims = self._victims()
            # Pages that the store has not acknowledged could not be loaded again: the store may be down.
            if not victims or not all(session_of(generation).stored for generation in victims):
                self._report_exceeded(STORE_PATIENCE_S if victims else 0.0)
                return
            excess -= sum(session_of(generation).sequence.nbytes for generation in victims)
            for generation in victims:
                self._preempt(generation)
        self._exceeded_at = None

    def resume_first(self) -> bool:
        """Resumes the preempted generation that arrived first; False if there is no room for it.

        It resumes whatever room there is if nothing else runs.
        """
        first, running = self._batch.preempted[0], self._batch.running
        growth = sum(
            self._memory.growth(session_of(each).method, each.slots * min(each.tokens_left, HEADROOM_TOKENS))
            for each in (first, *running)
        )
        need = session_of(first).min_bytes + growth
        if not self._memory.fits(need, self._batch.sessions, self._sessions.idle) and running:
            return False
        self._batch.resume(first)
        return True

    def _victims(self) -> list[Generation]:
        """Orphans first; then all choices of the call that arrived last, of those that decode. If only one call
        decodes, its choices are preempted one by one. The last decoding generation is never preempted."""
        decoding = sorted(
            (each for each in self._batch.running if not each.prefilling),
            key=lambda each: (each.call.left, *arrival_order(each)),
        )
        if len(decoding) < 2:
            return []
        last_call = [generation for generation in decoding if generation.call is decoding[-1].call]
        return last_call if len(last_call) < len(decoding) else last_call[-1:]

    def _preempt(self, generation: Generation) -> None:
        self._batch.preempt(generation)
        metrics.preempted.inc()
        if once("preempted"):
            log.warning("the caches do not fit the budget; generations are preempted", budget=self._memory.budget)

    def _report_exceeded(self, patience_s: float) -> None:
        """The budget stays exceeded. Counts it once, until the caches are within the budget again."""
        now = time.monotonic()
        if self._exceeded_at is None:
            self._exceeded_at = now + patience_s
        if now < self._exceeded_at:
            return
        self._exceeded_at = math.inf
        metrics.kv_budget_exceeded.inc()
        if once("budget"):
            reason = "the store has not acknowledged its pages" if patience_s else "no other generation decodes"
            log.warning(
                "the caches exceed the budget and no generation can be preempted",
                reason=reason,
                budget=self._memory.budget,
                excess_bytes=self._memory.excess_bytes,
            )
