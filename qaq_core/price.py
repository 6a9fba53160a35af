"""The price: what a bit costs one sequence.

It is found when a prompt ends, so that the packed tokens meet the target, and turned towards the target in
decode. A floor that many sequences share may be higher than what a sequence found for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qaq_core.allocation import Kept
from qaq_core.packed import PackedTokens
from qaq_core.policies import ErrorPolicy
from qaq_core.policies.base import solve_error, solve_price

if TYPE_CHECKING:
    from qaq_core.method import Method

SETTLED = 512
"""A price found while decoding is found again until this many tokens are packed."""

STEERING = 2.0
"""Octaves that the price turns by for each bit an element over the target, once in `Policy.narrow_every` steps."""

_UNLIMITED = 1 << 62


@dataclass(eq=False)
class Price:
    """What a bit costs one sequence.

    Attributes:
        own: what was found to meet the target; None until tokens are packed.
        floor: least price that is asked of this sequence.
        allowance: bytes that it may still ask for to get back what a floor took from it; None for no limit.
        recovering: a floor has fallen, and vectors get back what they gave up for it.
        settling: `own` was found in decode, from few tokens.
    """

    method: Method
    own: float | None = None
    floor: float = 0.0
    allowance: int | None = None
    recovering: bool = False
    settling: bool = False

    @property
    def elastic(self) -> bool:
        """Whether the sequence can give way to a price."""
        return self.method.policy.elastic

    @property
    def paid(self) -> float:
        """The price in force: its own, or the floor if that is higher."""
        return max(self._found, self.floor) if self.elastic else self._found

    @property
    def _found(self) -> float:
        return self.method.policy.price if self.own is None else self.own

    def widths(self, kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
        """What keys and values get for what is paid, see `Policy.widths`."""
        allocator = self.method.allocator
        return allocator.widths(allocator.demand(kept), self.paid)

    def bits_at(self, floor: float, kept: Kept) -> float:
        """Code bits an element of those tokens that a floor would leave."""
        allocator = self.method.allocator
        keys, values = allocator.widths(allocator.demand(kept), max(self._found, floor))
        return float(keys.float().mean() + values.float().mean()) / 4

    # -- towards the target ----------------------------------------------------------------------------

    def wanted(self, packed: int) -> bool:
        """Whether it must be found, or found again, before tokens join so many that are packed."""
        return self.own is None or (self.settling and packed < SETTLED)

    def solve(self, kept: Kept, length: int, fixed_bytes: int) -> None:
        """Finds what meets the target with those tokens.

        Args:
            kept: of all tokens that are packed or about to be.
            length: tokens of the sequence.
            fixed_bytes: what the cache will hold besides codes.
        """
        method, allocator = self.method, self.method.allocator
        if method.target.error is not None:
            assert isinstance(method.policy, ErrorPolicy)
            demand = method.policy.demand(allocator.view(kept))
            per_element = method.target.error / method.shape.head_dim
            self.own = solve_error(method.policy, demand, per_element * length)
            return
        target = method.target_bits(length, kept.shape[2], fixed_bytes)
        if target is None:
            self.own = method.policy.price
        else:
            self.own = solve_price(allocator, allocator.demand(kept), target)

    def steer(self, packed: PackedTokens, length: int, fixed_bytes: int) -> None:
        """Turns it towards what the target asks for: bits drift while tokens come and attention moves.

        Bits that a floor has taken are not missed here.
        """
        squeezed = self.elastic and (self.recovering or self.paid == self.floor)
        if self.own is None or squeezed or self.method.target.error is not None:
            return
        target = self.method.target_bits(length, len(packed), fixed_bytes)
        if target is not None:
            self.own *= 2.0 ** (STEERING * (packed.mean_bits - target))

    # -- among other sequences -------------------------------------------------------------------------

    def ask(self, floor: float) -> bool:
        """Sets the floor. True if more is paid now, False if as much as before, or less: then it recovers."""
        before, self.floor = self.paid, floor
        self.recovering = (self.elastic and self.paid < before) or (self.recovering and self.paid == before)
        return self.paid > before

    @property
    def most_bytes(self) -> int | None:
        """Bytes that may be asked for now to recover; None if there is nothing to recover."""
        if not self.recovering:
            return None
        return _UNLIMITED if self.allowance is None else self.allowance

    def spend(self, asked: int | None) -> None:
        """So many bytes were asked for to recover; None if few vectors lacked anything, which ends it."""
        if not self.recovering:
            return
        if asked is None:
            self.recovering = False
        elif self.allowance is not None:
            self.allowance -= asked

    def fork(self) -> Price:
        """The same price, for a sequence that has not been allowed anything yet."""
        return replace(self, allowance=None)
