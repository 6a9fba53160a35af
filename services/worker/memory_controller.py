"""Elastic precision: one price for all caches of a worker, high when memory is short.

The price that leaves the bits that there is room for is looked up in what a few sequences would hold at each of a
few prices; when every sequence has come to it, the bytes are looked at again.
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

HIGH, RAISED_TO, LOW, LOWERED_TO = 1.0, 0.95, 0.85, 0.92
"""Shares of the budget: over the first the price rises to reach the second, under the third it falls to reach the
fourth."""

SLICE_S, LONGEST_SLICE_S = 0.25, 1.0
"""Between two steps sequences are brought to a new price for as long as the step before took, within these:
streams go on at half their pace, and many sequences, whose steps are long, need not wait for many of them."""

TRIED = tuple(2.0**k for k in range(14))
"""Prices to look at, in units of the lowest that is paid: a factor of 4 is worth about a bit."""

STEP = 1.2
"""The least factor by which a price rises."""

ASKED = 3
"""Sequences that are asked what they would hold."""

ROUNDS_S = 0.25
"""Least seconds from one price to the next."""

OVERHEAD_BITS = 0.3
"""Of a packed element, beside its code: tags, scales, window. A guess for admission."""


class MemoryController:
    """Keeps the caches of a worker within a budget. Belongs to the engine's thread.

    Args:
        budget: bytes that all caches may hold, but for prompts that are being computed; None is unbounded.
        floor_bits: code bits an element that the price leaves on average.
        widen_bytes_per_s: of packed rows that may be fetched to give bits back.

    Attributes:
        lam: the least that a bit costs in any elastic sequence; 0 asks for nothing.
        short: bytes over the budget that no idle session and no price brings in; 0 if there are none.
    """

    def __init__(self, budget: int | None, floor_bits: float, widen_bytes_per_s: float) -> None:
        self._budget, self._anew = budget, False
        self.lam, self.short = 0.0, 0
        self._floor_bits = floor_bits
        self._rate = widen_bytes_per_s
        self._behind: deque[Session] = deque()
        self._looked = self._moved = self._told = time.monotonic()

    @property
    def budget(self) -> int | None:
        return self._budget

    @budget.setter
    def budget(self, kv_bytes: int | None) -> None:
        """For any thread. The price is looked for anew, even while sequences are brought to an earlier one."""
        self._budget, self._anew = kv_bytes, True

    def step(self, running: Sequence[Session], cache: SessionCache) -> bool:
        """Between two forward passes. `running` sessions may be at any place of their prompt.

        Returns:
            whether any of them was brought to another price.
        """
        settled = [session for session in running if not session.prefilling]
        for session in settled:  # those that came since, and those that began before the price changed
            if session.sequence.rate.floor != self.lam and session not in self._behind:
                self._behind.append(session)
        budget, self.short = self.budget, 0
        if budget is not None:
            growing = sum(session.sequence.packed.nbytes for session in running if session.prefilling)
            self._balance(budget, settled, cache, growing)
        elif self.lam:
            self._set(0.0, [*settled, *cache])
        moved = self._bring_up(set(map(id, [*running, *cache])))
        self._allow([*settled, *cache])
        return moved

    def fits(self, need: int, running: Sequence[Session], cache: SessionCache) -> bool:
        """Whether `need` more bytes fit when all give way as far as they may; idle sessions go for it."""
        if self.budget is None:
            return True
        while need + sum(map(self.least, running)) + sum(map(self.least, cache)) > self.budget:
            if not cache.evict():
                return False
        return True

    def least(self, session: Session) -> int:
        """Bytes of a session when the price is at its highest. Of a prompt under way, when it is packed."""
        sequence, packed = session.sequence, session.sequence.packed
        if session.prefilling:
            return max(session.needs, self.predict(session.method, len(session.tokens)))
        if not sequence.rate.elastic:
            return sequence.nbytes
        codes = packed.nbytes - packed.fixed_bytes
        return sequence.nbytes - max(0, codes - int(self._floor_bits * session.packed_elements / 8))

    def predict(self, method: Method, tokens: int) -> int:
        """Bytes of so many tokens at the highest price; a method that is not elastic may take 16 bits."""
        window = method.sinks + 2 * method.pack_tokens
        packed = max(0, tokens - method.sinks - method.pack_tokens)
        exact = _elements(method) * window * method.residual_dtype.itemsize
        return exact + self.growth(method, packed)

    def growth(self, method: Method, tokens: int) -> int:
        """Bytes that so many more tokens take at the highest price."""
        bits = (self._floor_bits if method.policy.elastic else 16) + OVERHEAD_BITS
        return int(_elements(method) * tokens * bits / 8)

    # -- inside ----------------------------------------------------------------------------------------

    def _balance(self, budget: int, settled: Sequence[Session], cache: SessionCache, used: int) -> None:
        """Finds the price for what is held now; `used` bytes of it by others than `settled`."""
        if self._behind and not self._anew:
            return
        used += sum(session.sequence.nbytes for session in settled)
        while used + sum(session.sequence.nbytes for session in cache) > budget * HIGH and cache.evict():
            pass
        everyone = [*settled, *cache]
        used += sum(session.sequence.nbytes for session in cache)
        giving = [s for s in everyone if s.sequence.rate.elastic and len(s.sequence.packed)]
        elements = sum(session.packed_elements for session in giving)
        if not elements:
            self.short = max(0, used - budget)
            self._set(0.0, everyone)
            return
        over, anew, self._anew = used > budget * HIGH, self._anew, False
        if over and (anew or time.monotonic() - self._moved > ROUNDS_S):
            if _code_bits(giving) <= self._floor_bits:
                self.short = used - budget
                return
            room = RAISED_TO * budget
        elif self.lam and used < budget * LOW and self._at_rest(everyone):
            room = LOWERED_TO * budget
        else:
            return
        held = sum(session.sequence.packed.nbytes for session in giving)
        asked = giving[:: -(-len(giving) // ASKED)]
        bits = 8 * (held + room - used) / elements - sum(map(_overhead_bits, asked)) / len(asked)
        lam = self._search(asked, max(bits, self._floor_bits))
        self._moved = time.monotonic()
        # What is held lags behind what would be wanted now, so a price that should do may have to be passed.
        least = STEP * (self.lam or _lowest(asked))
        self._set(max(lam, least) if over else min(lam, self.lam), everyone)

    def _search(self, asked: Sequence[Session], bits: float) -> float:
        """The lowest price that leaves so many code bits an element; 0 if no price is needed."""
        prices = [_lowest(asked) * factor for factor in TRIED]

        @functools.cache
        def left(place: int) -> float:
            return sum(session.sequence.bits_at(prices[place]) for session in asked) / len(asked)

        enough = bisect.bisect_left(range(len(prices)), True, key=lambda place: left(place) <= bits)
        if enough == len(prices):
            return prices[-1]
        if enough == 0:
            return 0.0
        # Between two prices bits fall about evenly with the price's logarithm.
        share = (left(enough - 1) - bits) / max(left(enough - 1) - left(enough), 1e-9)
        return prices[enough - 1] * (prices[enough] / prices[enough - 1]) ** share

    def _at_rest(self, everyone: Sequence[Session]) -> bool:
        """Whether bits that were given back have arrived, as far as they will while nobody decodes."""
        rest = not any(session.sequence.rate.recovering for session in everyone)
        return rest and time.monotonic() - self._moved > ROUNDS_S

    def _set(self, lam: float, everyone: Sequence[Session]) -> None:
        if lam == self.lam:
            return
        self.lam = lam
        metrics.kv_lambda.set(lam)
        self._behind = deque(everyone)

    def _bring_up(self, here: set[int]) -> bool:
        """Tells sequences the price, one after the other, until the time for it is over; False if all know it."""
        now, behind = time.monotonic(), len(self._behind)
        ends = now + min(max(now - self._told, SLICE_S), LONGEST_SLICE_S)
        while self._behind and time.monotonic() < ends:
            session = self._behind.popleft()
            if id(session) in here and not session.prefilling:
                session.sequence.set_lambda_floor(self.lam)
        self._told = time.monotonic()
        return behind > 0

    def _allow(self, everyone: Sequence[Session]) -> None:
        """Shares out the bytes that may be fetched since the last step."""
        now = time.monotonic()
        bytes_now, self._looked = (now - self._looked) * self._rate, now
        back = [session.sequence.rate for session in everyone if session.sequence.rate.recovering]
        for lam in back:
            held = lam.allowance or 0
            lam.allowance = int(min(self._rate, held + bytes_now / len(back)))


def _elements(method: Method) -> int:
    """Numbers of a token."""
    shape = method.shape
    return shape.layers * 2 * shape.kv_heads * shape.head_dim


def _lowest(asked: Sequence[Session]) -> float:
    """The lowest price that is paid without any pressure."""
    return min(session.sequence.rate.own or math.inf for session in asked)


def _code_bits(giving: Sequence[Session]) -> float:
    """Code bits an element that sessions hold."""
    bits = sum(session.sequence.packed.mean_bits * session.packed_elements for session in giving)
    return bits / sum(session.packed_elements for session in giving)


def _overhead_bits(session: Session) -> float:
    """What a packed element takes beside its code."""
    packed = session.sequence.packed
    return 8 * packed.nbytes / session.packed_elements - packed.mean_bits
