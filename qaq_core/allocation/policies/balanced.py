"""The balanced policy: every vector gets the widest width whose last bit saves more loss than λ.

    b* = argmin_b  w_t · mean_o c_o · D(b_o) · scale² + λ · b

c_o is the cost of an error in octet o of that layer and head (calibrated once per model), b_o the planes of the octet
in a row of b bits, D the codec's distortion, w_t the token's predicted attention relative to its head's mean. A row
grows width by width and gets the last width whose step gains more than its bits cost. The gain of a step is w_t times
a factor that depends on the row's scales alone. So the scales decide which w_t/λ each step requires, and that is
compared.
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
"""Weight of a token without attention."""

OWN = 0.93
"""Share of a token's own attention in its importance; the rest is the mean over it and the REACH tokens before it."""

REACH = 64

SINKS = 4


class BalancedPolicy:
    """Sensitivity-weighted allocation with one λ. kernels/allocate.py computes the same in C++.

    Args:
        quantizer: its codec gives D(b) and the planes of each octet at each width.
        costs: for keys and values, float32 [layers, kv_heads, octets].
    """

    elastic = True
    hysteresis = 2.5
    rise = 2.0
    """A moving average is late to show that a token has become important."""
    every = 4
    narrow_every = 16
    lam = 1e-9

    def __init__(self, quantizer: Quantizer, costs: tuple[torch.Tensor, torch.Tensor], exceptions: bool = True) -> None:
        self.exceptions, self.device = exceptions, costs[KEY].device
        head_dim = 8 * costs[KEY].shape[-1]
        distortion = torch.tensor([quantizer.codec.distortion(bits) for bits in range(9)], device=costs[KEY].device)
        self.tables = [
            CostTable(costs[side], quantizer.layout(side, head_dim), distortion, quantizer.codec.split)
            for side in (KEY, VALUE)
        ]

    def demand(self, view: View) -> WeightedRows:
        """Token weights, and the scales of their rows."""
        weight = token_weights(view.importance)[:, :, view.first : view.first + view.shape[2]]
        return WeightedRows(weight, view.scales, self.tables)

    def widths(self, demand: WeightedRows, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (_climb(demand.weight * (need / lam), least) for least in demand.thresholds)
        return keys, values

    def error(self, demand: WeightedRows, widths: tuple[torch.Tensor, torch.Tensor]) -> float:
        """½ · Σ w · c · D(b) · scale²: c are traces of the Fisher information, see `calibration.sensitivities`."""
        total = 0.0
        for table, scale, width in zip(self.tables, demand.scales, widths, strict=True):
            total += float((demand.weight * table.lost(scale, width)).sum(dtype=torch.float64))
        return total / 2


@dataclass(frozen=True)
class WeightedRows:
    """Token weights w_t [layers, kv_heads, n], and the scales and costs of their rows."""

    weight: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor]
    tables: Sequence[CostTable]

    @cached_property
    def thresholds(self) -> list[torch.Tensor]:
        """See `CostTable.thresholds`."""
        return [table.thresholds(scale) for table, scale in zip(self.tables, self.scales, strict=True)]


class CostTable:
    """The cost of errors in one side's rows, per width and per part of the row that has its own scale."""

    def __init__(self, costs: torch.Tensor, layout: RowLayout, distortion: torch.Tensor, split: int) -> None:
        planes = layout.planes[list(CODED)].long().to(costs.device)
        lost = costs.unsqueeze(-2) * distortion[planes] / costs.shape[-1]  # [layers, kv_heads, widths, octets]
        parts = (lost[..., :split], lost[..., split:]) if split else (lost,)
        self._lost = torch.stack([part.sum(-1) for part in parts])  # [parts, layers, kv_heads, widths]

    def thresholds(self, scale: torch.Tensor) -> torch.Tensor:
        """The w/λ that a row must exceed to take a step or a later one: float32 [steps, layers, kv_heads, n].

        Thresholds never fall from step to step. Sums and products are rounded one by one, so that a row's thresholds
        do not depend on other rows.

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

    def by_meta(self, scales: torch.Tensor) -> torch.Tensor:
        """`lost` for every meta byte and width of a tag: float32 [layers, kv_heads, 256, widths].

        Args:
            scales: [1, 1, 256, parts], of each meta byte.
        """
        total = torch.zeros(*self._lost.shape[1:3], 256, len(WIDTHS), device=scales.device)
        for lost, power in zip(self._lost, scales[0, 0].square().unbind(-1), strict=True):
            total[..., : len(CODED)] += lost.unsqueeze(-2) * power.unsqueeze(-1)
        return total

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
    """w_t = 0.9997 · s_t / mean(s) + 0.0003; 7% of s is attention to preceding tokens, since reading continues forward.

    Sinks count as 0: they are not quantized, and their attention would dominate the mean.

    Args:
        importance: [layers, kv_heads, length].
    """
    own = importance.clone()
    own[:, :, :SINKS] = 0.0
    smooth = own * OWN + trailing_mean(own, REACH) * (1 - OWN)
    mean = smooth.mean(-1, keepdim=True, dtype=torch.float64).float()
    return smooth * (mean.clamp_min(1e-30).reciprocal() * (1 - FLOOR)) + FLOOR


def trailing_mean(values: torch.Tensor, reach: int) -> torch.Tensor:
    """Mean over a position and those at most `reach` before it, along the last dim."""
    sums = torch.nn.functional.pad(values.double(), (1, 0)).cumsum(-1)
    end = torch.arange(1, values.shape[-1] + 1, device=values.device)
    begin = (end - 1 - reach).clamp_min(0)
    return ((sums[..., 1:] - sums[..., begin]) / (end - begin)).float()
