"""What a bit policy is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class View:
    """What a policy may look at: one sequence's packed (or about to be packed) tokens.

    Attributes:
        importance: float32 [layers, kv_heads, length], predicted attention of all tokens, by position.
        first: position of the first of the n tokens that get bits.
        scales: for keys and values, float32 [layers or 1, kv_heads or 1, n, 1 or 2], see `Codec.affine`.
    """

    importance: torch.Tensor
    first: int
    scales: tuple[torch.Tensor, torch.Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        layers, heads, _ = self.importance.shape
        return layers, heads, self.scales[0].shape[2]


Demand = Any
"""A policy's own summary of a view."""


class Rule(Protocol):
    """Anything that gives widths at a price."""

    def widths(self, demand: Demand, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Policy.widths`."""
        ...


class Policy(Rule, Protocol):
    exceptions: bool
    """Whether tokens are looked at again while decoding."""

    elastic: bool
    """Whether the price is an exchange rate of loss against bits, so that several sequences may share one."""

    every: int
    """Decode steps from one look to the next."""

    narrow_every: int
    """Decode steps from one look that takes bits back to the next: it is not urgent, and re-packs blocks."""

    def demand(self, view: View) -> Demand:
        """What does not depend on the price."""
        ...

    def widths(self, demand: Demand, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Bits for keys and values.

        Args:
            lam: the one knob between bytes and error; higher gives fewer bits.
            need: factor on the importance, for hysteresis.
        Returns:
            two uint8 [layers, kv_heads, n] of widths among `packing.WIDTHS`, in half bits.
        """
        ...

    @property
    def hysteresis(self) -> float:
        """A vector moves only if it would with its importance this many times smaller (up) or larger (down)."""
        ...

    @property
    def rise(self) -> float:
        """A vector that moves up gets what it would with its importance this many times larger."""
        ...

    @property
    def lam(self) -> float:
        """The price to use when no target is given."""
        ...


@runtime_checkable
class ErrorPolicy(Policy, Protocol):
    """A policy that predicts what its widths cost."""

    def error(self, demand: Demand, widths: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Predicted KL, summed over layers, heads, keys and values and the view's tokens; per element, in nats.

        Times head_dim and divided by the tokens of the sequence it is the KL of one decoded token.
        """
        ...


def solve_lambda(rule: Rule, demand: Demand, target_bits: float) -> float:
    """The lowest price at which keys and values hold at most `target_bits` on average."""

    def is_enough(lam: float) -> bool:
        keys, values = rule.widths(demand, lam)
        return float(keys.float().mean() + values.float().mean()) / 4 <= target_bits

    return _turn(is_enough)[1]


def solve_error(policy: ErrorPolicy, demand: Demand, tolerated: float) -> float:
    """The highest price at which `ErrorPolicy.error` is at most `tolerated`, or the lowest there is."""
    return _turn(lambda lam: policy.error(demand, policy.widths(demand, lam)) > tolerated)[0]


def _turn(holds: Callable[[float], bool]) -> tuple[float, float]:
    """Prices just below and just above the one from which on something holds: bisection on their logarithm."""
    low, high = -60.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        if holds(2.0**middle):
            high = middle
        else:
            low = middle
    return 2.0**low, 2.0**high
