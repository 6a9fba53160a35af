"""Elastic precision: one floor for λ, shared by all caches of a worker, which rises when memory is short.

λ is the loss that one bit must save. The controller looks up the floor that brings the caches within the budget in
what a few sampled sequences would hold at several floors. It measures the bytes again once every sequence has
applied the floor.
"""

from __future__ import annotations

import bisect
import functools
import math
import time
from collections import deque
from collections.abc import Sequence

from qaq_core import Method
from services.common import metrics
from services.worker.session import Session
from services.worker.session_cache import SessionCache

HIGH_WATERMARK, HIGH_TARGET = 1.0, 0.95
"""Shares of the budget. Above the first, λ rises until the caches hold the second."""

LOW_WATERMARK, LOW_TARGET = 0.85, 0.92
"""Shares of the budget. Below the first, λ falls until the caches hold the second."""

MIN_SLICE_S, MAX_SLICE_S = 0.25, 1.0
"""Bounds of the time between two steps in which sequences apply a new floor. The slice is as long as the last step:
streams then keep half of their speed, and a large batch, whose steps are long, converges in a few slices."""

FLOOR_FACTORS = tuple(2.0**k for k in range(14))
"""Floors to look up, as factors of the lowest λ in use. A factor of 4 is worth about one bit."""

MIN_RISE = 1.2
"""The smallest factor by which λ rises."""

SAMPLED_SEQUENCES = 3
"""Sequences whose bits at each floor are looked up."""

MIN_INTERVAL_S = 0.25
"""The shortest time between two changes of λ."""

OVERHEAD_BITS = 0.3
"""Bits of a packed element besides its code: tags, scales, attention statistics. An estimate for admission."""


class MemoryController:
    """Keeps the caches of a worker within a budget. Used by the scheduler's thread alone, except for `budget`.

    Args:
        budget: bytes that all caches may hold, except those of prompts in prefill; None is unbounded.
        min_bits: mean code bits per element that the floor leaves to the caches.
        recovery_bytes_per_s: bandwidth for packed rows fetched to restore bits.

    Attributes:
        lam: the λ floor of every elastic sequence; 0 if there is none. A session may have a higher one.
        excess_bytes: bytes over the budget that neither evicting idle sessions nor raising λ can free.
    """

    def __init__(self, budget: int | None, min_bits: float, recovery_bytes_per_s: float) -> None:
        self._budget, self._budget_changed = budget, False
        self.lam, self.excess_bytes = 0.0, 0
        self._min_bits = min_bits
        self._recovery_rate = recovery_bytes_per_s
        self._pending: deque[Session] = deque()  # sequences that have not applied the floor yet
        self._granted_at = self._changed_at = self._applied_at = time.monotonic()

    @property
    def budget(self) -> int | None:
        return self._budget

    @budget.setter
    def budget(self, kv_bytes: int | None) -> None:
        """May be set from any thread. λ is searched again, even while sequences apply an earlier floor."""
        self._budget, self._budget_changed = kv_bytes, True

    def step(self, running: Sequence[Session], idle: SessionCache) -> bool:
        """Adjusts λ between two forward passes. `running` sessions may be in prefill.

        Returns:
            whether a sequence applied another floor.
        """
        decoding = [session for session in running if not session.prefilling]
        for session in decoding:  # new sessions, and those whose prefill began under an earlier floor
            if session.sequence.rate.floor != self._floor(session) and session not in self._pending:
                self._pending.append(session)
        budget, self.excess_bytes = self.budget, 0
        if budget is not None:
            prefill_bytes = sum(session.sequence.packed.nbytes for session in running if session.prefilling)
            self._balance(budget, decoding, idle, prefill_bytes)
        elif self.lam:
            self._set_floor(0.0, [*decoding, *idle])
        applied = self._apply_floor(set(map(id, [*running, *idle])))
        self._grant_recovery(decoding)
        return applied

    def set_floor(self, session: Session, floor: float) -> None:
        """Sets the least λ of one session, which applies it at the next step."""
        session.floor = floor
        if session not in self._pending:
            self._pending.append(session)

    def floor_for(self, session: Session, bits: float) -> float:
        """The lowest floor that leaves a session at most `bits` code bits per element; 0 if none is needed.

        Tokens must be packed.
        """
        return self._search([session], bits)

    def fits(self, need: int, running: Sequence[Session], idle: SessionCache) -> bool:
        """Whether `need` more bytes fit with all caches at their smallest. Evicts idle sessions to make room."""
        if self.budget is None:
            return True
        while need + sum(map(self.min_bytes, running)) + sum(map(self.min_bytes, idle)) > self.budget:
            if not idle.evict():
                return False
        return True

    def min_bytes(self, session: Session) -> int:
        """Bytes of a session at the highest floor. For a prompt in prefill: once it is packed."""
        sequence, packed = session.sequence, session.sequence.packed
        if session.prefilling:
            return max(session.min_bytes, self.predict(session.method, len(session.tokens)))
        if not sequence.rate.elastic:
            return sequence.nbytes
        code_bytes = packed.nbytes - packed.fixed_bytes
        return sequence.nbytes - max(0, code_bytes - int(self._min_bits * session.packed_elements / 8))

    def predict(self, method: Method, tokens: int) -> int:
        """Bytes of a sequence of `tokens` tokens at the highest floor; 16 bits if the method is not elastic."""
        window = method.sinks + 2 * method.pack_tokens
        packed = max(0, tokens - method.sinks - method.pack_tokens)
        residual_bytes = _elements_per_token(method) * window * method.residual_dtype.itemsize
        return residual_bytes + self.growth(method, packed)

    def growth(self, method: Method, tokens: int) -> int:
        """Bytes that `tokens` more tokens take at the highest floor."""
        bits = (self._min_bits if method.policy.elastic else 16) + OVERHEAD_BITS
        return int(_elements_per_token(method) * tokens * bits / 8)

    # -- inside ----------------------------------------------------------------------------------------

    def _balance(self, budget: int, decoding: Sequence[Session], idle: SessionCache, used: int) -> None:
        """Finds λ for what the caches hold. `used` bytes belong to prompts in prefill."""
        if self._pending and not self._budget_changed:
            return
        used += sum(session.sequence.nbytes for session in decoding)
        while used + sum(session.sequence.nbytes for session in idle) > budget * HIGH_WATERMARK and idle.evict():
            pass
        sessions = [*decoding, *idle]
        used += sum(session.sequence.nbytes for session in idle)
        elastic = [s for s in sessions if s.sequence.rate.elastic and len(s.sequence.packed)]
        elements = sum(session.packed_elements for session in elastic)
        if not elements:
            self.excess_bytes = max(0, used - budget)
            self._set_floor(0.0, sessions)
            return
        over, changed, self._budget_changed = used > budget * HIGH_WATERMARK, self._budget_changed, False
        if over and (changed or time.monotonic() - self._changed_at > MIN_INTERVAL_S):
            if _mean_code_bits(elastic) <= self._min_bits:
                self.excess_bytes = used - budget
                return
            target = HIGH_TARGET * budget
        elif self.lam and used < budget * LOW_WATERMARK and self._recovered(decoding):
            target = LOW_TARGET * budget
        else:
            return
        packed_bytes = sum(session.sequence.packed.nbytes for session in elastic)
        sampled = elastic[:: -(-len(elastic) // SAMPLED_SEQUENCES)]
        bits = 8 * (packed_bytes + target - used) / elements - sum(map(_overhead_bits, sampled)) / len(sampled)
        lam = self._search(sampled, max(bits, self._min_bits))
        self._changed_at = time.monotonic()
        # Held bits may exceed the bits that λ would assign now, so a λ that should suffice may be too low.
        least = MIN_RISE * (self.lam or _lowest_lambda(sampled))
        self._set_floor(max(lam, least) if over else min(lam, self.lam), sessions)

    def _search(self, sampled: Sequence[Session], bits: float) -> float:
        """The lowest floor that leaves at most `bits` code bits per element; 0 if none is needed."""
        floors = [_lowest_lambda(sampled) * factor for factor in FLOOR_FACTORS]

        @functools.cache
        def bits_at(index: int) -> float:
            return sum(session.sequence.bits_at(floors[index]) for session in sampled) / len(sampled)

        enough = bisect.bisect_left(range(len(floors)), True, key=lambda index: bits_at(index) <= bits)
        if enough == len(floors):
            return floors[-1]
        if enough == 0:
            return 0.0
        # Between two floors, bits fall about linearly in the logarithm of λ.
        share = (bits_at(enough - 1) - bits) / max(bits_at(enough - 1) - bits_at(enough), 1e-9)
        return floors[enough - 1] * (floors[enough] / floors[enough - 1]) ** share

    def _recovered(self, decoding: Sequence[Session]) -> bool:
        """Whether the bits restored by the last change of λ have arrived. Idle sessions get theirs when they decode."""
        recovered = not any(session.sequence.rate.recovering for session in decoding)
        return recovered and time.monotonic() - self._changed_at > MIN_INTERVAL_S

    def _floor(self, session: Session) -> float:
        return max(self.lam, session.floor)

    def _set_floor(self, lam: float, sessions: Sequence[Session]) -> None:
        if lam == self.lam:
            return
        self.lam = lam
        metrics.kv_lambda.set(lam)
        self._pending = deque(sessions)

    def _apply_floor(self, present: set[int]) -> bool:
        """Applies the floor to pending sequences until the time slice ends; False if none was pending.

        Args:
            present: ids of the sessions that still exist.
        """
        now, pending = time.monotonic(), len(self._pending)
        ends = now + min(max(now - self._applied_at, MIN_SLICE_S), MAX_SLICE_S)
        while self._pending and time.monotonic() < ends:
            session = self._pending.popleft()
            if id(session) in present and not session.prefilling:
                session.sequence.set_lambda_floor(self._floor(session))
        self._applied_at = time.monotonic()
        return pending > 0

    def _grant_recovery(self, decoding: Sequence[Session]) -> None:
        """Divides the bytes that may be fetched since the last step among the sequences that recover bits now."""
        now = time.monotonic()
        granted, self._granted_at = (now - self._granted_at) * self._recovery_rate, now
        recovering = [session.sequence.rate for session in decoding if session.sequence.rate.recovering]
        for rate in recovering:
            left = rate.allowance or 0
            rate.allowance = int(min(self._recovery_rate, left + granted / len(recovering)))


def _elements_per_token(method: Method) -> int:
    """Numbers in one token's keys and values, over all layers."""
    shape = method.shape
    return shape.layers * 2 * shape.kv_heads * shape.head_dim


def _lowest_lambda(sessions: Sequence[Session]) -> float:
    """The lowest λ that the sessions use without a floor."""
    return min(session.sequence.rate.own or math.inf for session in sessions)


def _mean_code_bits(sessions: Sequence[Session]) -> float:
    """Code bits per packed element, over the sessions."""
    bits = sum(session.sequence.packed.mean_bits * session.packed_elements for session in sessions)
    return bits / sum(session.packed_elements for session in sessions)


def _overhead_bits(session: Session) -> float:
    """Bits of a packed element besides its code."""
    packed = session.sequence.packed
    return 8 * packed.nbytes / session.packed_elements - packed.mean_bits
