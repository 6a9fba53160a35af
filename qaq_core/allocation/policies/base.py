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
"""What a policy computes from a view once, for widths at any λ."""


class Rule(Protocol):
    """Gives widths at a λ."""

    def widths(self, demand: Demand, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Policy.widths`."""
        ...


class Policy(Rule, Protocol):
    exceptions: bool
    """Whether decode looks for attention-window exceptions."""

    elastic: bool
    """Whether λ is loss per bit, so that several sequences may share it."""

    every: int
    """Decode steps from one review to the next."""

    narrow_every: int
    """Decode steps from one review that narrows to the next: narrowing is not urgent, and repacks blocks."""

    def demand(self, view: View) -> Demand:
        """What `widths` needs at any λ."""
        ...

    def widths(self, demand: Demand, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Widths of keys and values.

        Args:
            lam: λ, the loss that a bit must save; higher gives fewer bits.
            need: factor on the importance, for hysteresis.
        Returns:
            two uint8 [layers, kv_heads, n] of widths among `WIDTHS`, in half bits.
        """
        ...

    @property
    def hysteresis(self) -> float:
        """A width changes only if it also would at this many times less importance (up) or more (down)."""
        ...

    @property
    def rise(self) -> float:
        """A vector that is widened gets the width for this many times its importance."""
        ...

    @property
    def lam(self) -> float:
        """λ when no target is given."""
        ...


@runtime_checkable
class ErrorPolicy(Policy, Protocol):
    """A policy that predicts the error of its widths."""

    def error(self, demand: Demand, widths: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Predicted KL, summed over layers, heads, keys and values and the view's tokens; per element, in nats.

        Times head_dim and divided by the tokens of the sequence it is the KL of one decoded token.
        """
        ...


def solve_lambda(rule: Rule, demand: Demand, target_bits: float) -> float:
    """The lowest λ at which keys and values have at most `target_bits` on average."""

    def is_enough(lam: float) -> bool:
        keys, values = rule.widths(demand, lam)
        return float(keys.float().mean() + values.float().mean()) / 4 <= target_bits

    return _bisect(is_enough)[1]


def solve_error(policy: ErrorPolicy, demand: Demand, tolerated: float) -> float:
    """The highest λ at which `ErrorPolicy.error` is at most `tolerated`, or the lowest there is."""
    return _bisect(lambda lam: policy.error(demand, policy.widths(demand, lam)) > tolerated)[0]


def _bisect(holds: Callable[[float], bool]) -> tuple[float, float]:
    """λ just below and just above the value from which `holds` is true: bisection on log λ."""
    low, high = -60.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        if holds(2.0**middle):
            high = middle
        else:
            low = middle
    return 2.0**low, 2.0**high
