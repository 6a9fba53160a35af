"""The balanced policy: every vector gets the bits at which the next step up is worth its price.

    b* = argmin_b  w_t · mean_o c_o · D(b_o) · scale² + λ · b

c_o is what an error in octet o of that layer and head costs (calibrated once per model), b_o the planes the octet
has in a row of b bits, D the codec's distortion, w_t the token's predicted attention relative to its head's mean,
λ the price. A row grows step by step, one width after the other, and gets the last width whose step gains more
than its bits cost. What a step gains is w_t times what only the row's scales decide; so a row's scales say which
w_t/λ each step asks for, and that is what is compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from qaq_core.allocation.policies.base import View
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.quantization.bit_planes import RowLayout
from qaq_core.quantization.quantizer import Quantizer

CODED = tuple(width for width in WIDTHS if width < HALF)
"""Widths that hold codes, from 0."""
FLOOR = 0.0003
"""Weight of a token that nobody looks at."""

OWN = 0.93
"""Share of a token's own attention in its importance; the rest is the mean of it and of REACH tokens before it."""

REACH = 64

SINKS = 4


class BalancedPolicy:
    """Sensitivity-weighted allocation with one price. native/balance.py does the same in C++.

    Args:
        quantizer: its codec gives D(b) and the planes of each octet at each width.
        costs: for keys and values, float32 [layers, kv_heads, octets].
    """

    elastic = True
    hysteresis = 2.5
    rise = 2.0
    """A moving average takes a while to say how important a token has become."""
    every = 4
    narrow_every = 16
    lam = 1e-9

    def __init__(self, quantizer: Quantizer, costs: tuple[torch.Tensor, torch.Tensor], exceptions: bool = True) -> None:
        self.exceptions = exceptions
        head_dim = 8 * costs[KEY].shape[-1]
        distortion = torch.tensor([quantizer.codec.distortion(bits) for bits in range(9)], device=costs[KEY].device)
        self.tables = [
            CostTable(costs[side], quantizer.layout(side, head_dim), distortion, quantizer.codec.split)
            for side in (KEY, VALUE)
        ]

    def demand(self, view: View) -> Weighed:
        """What tokens weigh, and their rows' scales."""
        weight = token_weights(view.importance)[:, :, view.first : view.first + view.shape[2]]
        return Weighed(weight, view.scales, self.tables)

    def widths(self, demand: Weighed, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (_climb(demand.weight * (need / lam), least) for least in demand.thresholds)
        return keys, values

    def error(self, demand: Weighed, widths: tuple[torch.Tensor, torch.Tensor]) -> float:
        """½ · Σ w · c · D(b) · scale²: c are traces of the Fisher information, see `sensitivity`."""
        total = 0.0
        for table, scale, width in zip(self.tables, demand.scales, widths, strict=True):
            total += float((demand.weight * table.lost(scale, width)).sum(dtype=torch.float64))
        return total / 2


@dataclass(frozen=True)
class Weighed:
    """Tokens of weight w_t [layers, kv_heads, n], and what their keys and values ask of it."""

    weight: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor]
    tables: Sequence[CostTable]

    @cached_property
    def thresholds(self) -> list[torch.Tensor]:
        """See `CostTable.thresholds`."""
        return [table.thresholds(scale) for table, scale in zip(self.tables, self.scales, strict=True)]


class CostTable:
    """What errors in one side's rows cost, per width and part of the row that has a scale of its own."""

    def __init__(self, costs: torch.Tensor, layout: RowLayout, distortion: torch.Tensor, split: int) -> None:
        planes = layout.planes[list(CODED)].long().to(costs.device)
        lost = costs.unsqueeze(-2) * distortion[planes] / costs.shape[-1]  # [layers, kv_heads, widths, octets]
        parts = (lost[..., :split], lost[..., split:]) if split else (lost,)
        self._lost = torch.stack([part.sum(-1) for part in parts])  # [parts, layers, kv_heads, widths]

    def thresholds(self, scale: torch.Tensor) -> torch.Tensor:
        """The w/λ that a row must exceed to take a step, or one after it: float32 [steps, layers, kv_heads, n].

        They never fall from step to step. Sums and products are rounded one by one, so that a row's are the same
        alone and among others.

        Args:
            scale: [layers or 1, kv_heads or 1, n, parts].
        """
        powers = scale.square().unbind(-1)
        steps = (self._lost[..., :-1] - self._lost[..., 1:]).unsqueeze(-2)  # [parts, layers, kv_heads, 1, steps]
        shape = (*steps.shape[1:3], scale.shape[2])
        least = torch.empty(steps.shape[-1], *shape, device=scale.device)
        for step, (before, after) in enumerate(itertools.pairwise(CODED)):
            gained = torch.zeros(shape, device=scale.device)
            for gain, power in zip(steps[..., step], powers, strict=True):
                gained += gain * power
            torch.div((after - before) / 2, gained, out=least[step])
        for step in range(len(least) - 2, -1, -1):
            torch.minimum(least[step], least[step + 1], out=least[step])
        return least

    def lost(self, scale: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
        """mean_o c_o · D(b_o) · scale² of rows of widths uint8 [layers, kv_heads, n], float32 of that shape."""
        place = torch.bucketize(width, torch.tensor(CODED, device=width.device))
        total = torch.zeros_like(scale[..., 0])
        for lost, power in zip(self._lost, scale.square().unbind(-1), strict=True):
            total += lost.gather(-1, place) * power
        return total


def _climb(worth: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """The width after the last step whose threshold is exceeded: uint8 [layers, kv_heads, n]."""
    out = torch.zeros(worth.shape, dtype=torch.uint8, device=worth.device)
    for threshold, width in zip(least, CODED[1:], strict=True):
        taken = (worth > threshold).view(torch.uint8)
        torch.maximum(out, taken.mul_(width), out=out)
    return out


def token_weights(importance: torch.Tensor) -> torch.Tensor:
    """w_t = 0.9997 · s_t / mean(s) + 0.0003. 7% of s is what the tokens before got: what is read is read on.

    Sinks count as 0: they are exact, and their attention would drown everyone else's in the mean.

    Args:
        importance: [layers, kv_heads, length].
    """
    looked = importance.clone()
    looked[:, :, :SINKS] = 0.0
    smooth = looked * OWN + trailing_mean(looked, REACH) * (1 - OWN)
    mean = smooth.mean(-1, keepdim=True, dtype=torch.float64).float()
    return smooth * (mean.clamp_min(1e-30).reciprocal() * (1 - FLOOR)) + FLOOR


def trailing_mean(values: torch.Tensor, reach: int) -> torch.Tensor:
    """Mean over a position and those at most `reach` before it, along the last dim."""
    sums = torch.nn.functional.pad(values.double(), (1, 0)).cumsum(-1)
    end = torch.arange(1, values.shape[-1] + 1, device=values.device)
    begin = (end - 1 - reach).clamp_min(0)
    return ((sums[..., 1:] - sums[..., begin]) / (end - begin)).float()
