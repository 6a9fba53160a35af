"""What a bit policy is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class View:
    """What a policy may look at: one sequence's packed (or about to be packed) tokens.

    Attributes:
        importance: float32 [layers, kv_heads, length], predicted attention of all tokens, by position.
        first: position of the first of the n tokens that get bits.
        scales: for keys and values, float32 [layers or 1, kv_heads or 1, n], see `Codec.affine`.
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


class Policy(Protocol):
    exceptions: bool
    """Whether tokens are looked at again while decoding."""

    every: int
    """Decode steps from one look to the next."""

    narrow_every: int
    """Decode steps from one look that takes bits back to the next: it is not urgent, and re-packs blocks."""

    def demand(self, view: View) -> Demand:
        """What does not depend on the price."""
        ...

    def widths(self, demand: Demand, price: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Bits for keys and values.

        Args:
            price: the one knob between bytes and error; higher gives fewer bits.
            need: factor on the importance, for hysteresis.
        Returns:
            two uint8 [layers, kv_heads, n] of widths that `packing.WIDTHS` has.
        """
        ...

    @property
    def hysteresis(self) -> float:
        """A vector moves only if it would with its importance this many times smaller (up) or larger (down)."""
        ...

    @property
    def price(self) -> float:
        """The price to use when no target is given."""
        ...


def solve_price(policy: Policy, demand: Demand, target_bits: float) -> float:
    """The price at which keys and values hold `target_bits` on average: bisection on its logarithm."""
    low, high = -60.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        keys, values = policy.widths(demand, 2.0**middle)
        if float(keys.float().mean() + values.float().mean()) / 2 > target_bits:
            low = middle
        else:
            high = middle
    return 2.0**high
