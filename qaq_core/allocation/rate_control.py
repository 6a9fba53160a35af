"""Rate control: λ, the loss that one bit must save, of one sequence.

λ is found when a prompt ends, so that the packed tokens meet the target, and steered towards the target in
decode. A floor that many sequences share may be higher than what a sequence found for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qaq_core.allocation.allocator import Allocator, TokenState
from qaq_core.allocation.policies import ErrorPolicy
from qaq_core.allocation.policies.base import solve_error, solve_lambda
from qaq_core.allocation.target import Target
from qaq_core.storage import PackedTokens

SETTLED = 512
"""A λ found while decoding is found again until this many tokens are packed."""

STEERING = 2.0
"""Octaves by which λ moves for each bit an element over the target, once in `Policy.narrow_every` steps."""

_UNLIMITED = 1 << 62


@dataclass(eq=False)
class RateControl:
    """λ of one sequence.

    Attributes:
        elements_per_token: numbers in one token's keys and values, over all layers.
        own: the λ that meets the target; None until tokens are packed.
        floor: least λ that is asked of this sequence.
        allowance: bytes that it may still fetch to get back what a floor took from it; None for no limit.
        recovering: a floor has fallen, and vectors get back what they gave up for it.
        settling: `own` was found in decode, from few tokens.
    """

    allocator: Allocator
    target: Target
    elements_per_token: int
    head_dim: int
    own: float | None = None
    floor: float = 0.0
    allowance: int | None = None
    recovering: bool = False
    settling: bool = False

    @property
    def elastic(self) -> bool:
        """Whether the sequence can give up bits for a floor."""
        return self.allocator.policy.elastic

    @property
    def value(self) -> float:
        """The λ in force: its own, or the floor if that is higher."""
        return max(self._found, self.floor) if self.elastic else self._found

    @property
    def _found(self) -> float:
        return self.allocator.policy.lam if self.own is None else self.own

    def widths(self, state: TokenState) -> tuple[torch.Tensor, torch.Tensor]:
        """The widths of keys and values at the λ in force, see `Policy.widths`."""
        return self.allocator.widths(self.allocator.demand(state), self.value)

    def bits_at(self, floor: float, state: TokenState) -> float:
        """Code bits an element of those tokens that a floor would leave."""
        keys, values = self.allocator.widths(self.allocator.demand(state), max(self._found, floor))
        return float(keys.float().mean() + values.float().mean()) / 4

    # -- towards the target ----------------------------------------------------------------------------

    def unsolved(self, packed: int) -> bool:
        """Whether λ must be found, or found again, before tokens join the `packed` ones."""
        return self.own is None or (self.settling and packed < SETTLED)

    def restart(self) -> None:
        """No token is packed any more: λ will be found anew."""
        self.own, self.settling, self.recovering = None, False, False

    def solve(self, state: TokenState, length: int, fixed_bytes: int) -> None:
        """Finds the λ that meets the target with those tokens.

        Args:
            state: of all tokens that are packed or about to be.
            length: tokens of the sequence.
            fixed_bytes: what the cache will hold besides codes.
        """
        allocator, policy = self.allocator, self.allocator.policy
        if self.target.error is not None:
            assert isinstance(policy, ErrorPolicy)
            per_element = self.target.error / self.head_dim
            self.own = solve_error(policy, policy.demand(allocator.view(state)), per_element * length)
            return
        bits = self._target_bits(length, state.shape[2], fixed_bytes)
        self.own = policy.lam if bits is None else solve_lambda(allocator, allocator.demand(state), bits)

    def steer(self, packed: PackedTokens, length: int, fixed_bytes: int) -> None:
        """Moves λ towards the target: bits drift while tokens arrive and attention moves.

        Bits that a floor has taken do not count as missing.
        """
        squeezed = self.elastic and (self.recovering or self.value == self.floor)
        if self.own is None or squeezed or self.target.error is not None:
            return
        bits = self._target_bits(length, len(packed), fixed_bytes)
        if bits is not None:
            self.own *= 2.0 ** (STEERING * (packed.mean_bits - bits))

    def _target_bits(self, length: int, packed: int, fixed_bytes: int) -> float | None:
        return self.target.bits_for(length, packed, fixed_bytes, self.elements_per_token)

    # -- among other sequences -------------------------------------------------------------------------

    def set_floor(self, floor: float) -> bool:
        """Sets the floor. True if λ rose; if it fell, the sequence recovers."""
        before, self.floor = self.value, floor
        self.recovering = (self.elastic and self.value < before) or (self.recovering and self.value == before)
        return self.value > before

    @property
    def most_bytes(self) -> int | None:
        """Bytes that may be fetched now to recover; None if there is nothing to recover."""
        if not self.recovering:
            return None
        return _UNLIMITED if self.allowance is None else self.allowance

    def charge(self, fetched: int | None) -> None:
        """Counts bytes fetched to recover; None says that few vectors lack anything, which ends the recovery."""
        if not self.recovering:
            return
        if fetched is None:
            self.recovering = False
        elif self.allowance is not None:
            self.allowance -= fetched

    def fork(self) -> RateControl:
        """The same λ, for a sequence that has no allowance yet."""
        return replace(self, allowance=None)
