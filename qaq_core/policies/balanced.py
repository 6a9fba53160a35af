"""The balanced policy: every vector gets the bits at which the next step up is worth its price.

    b* = argmin_b  w_t · mean_o c_o · D(b_o) · scale² + λ · b

c_o is what an error in octet o of that layer and head costs (calibrated once per model), b_o the planes the octet
has in a row of b bits, D the codec's distortion, w_t the token's predicted attention relative to its head's mean,
λ the price. A row grows step by step, one width after the other; what a step gains is an entry of a table per
layer and head, times scale² and w_t.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from qaq_core.packing import HALF, WIDTHS, RowLayout
from qaq_core.pages import KEY, VALUE
from qaq_core.policies.base import View
from qaq_core.quantizer import Quantizer

CODED = tuple(width for width in WIDTHS if width < HALF)
"""Widths that hold codes, from 0."""
FLOOR = 0.002
REACH = 16
SINKS = 4


@dataclass(frozen=True)
class Gains:
    """What one side's tokens cost at width 0, and what each step up takes from it.

    Attributes:
        base: float32 [layers, kv_heads, n].
        steps: float32 [steps, layers, kv_heads, n], of each step from one of CODED to the next.
    """

    base: torch.Tensor
    steps: torch.Tensor


class BalancedPolicy:
    """Sensitivity-weighted allocation with one price.

    Args:
        quantizer: its codec gives D(b) and the planes of each octet at each width.
        costs: for keys and values, float32 [layers, kv_heads, octets].
    """

    elastic = True
    hysteresis = 2.0
    every = 4
    narrow_every = 16
    price = 1e-9

    def __init__(
        self, quantizer: Quantizer, costs: tuple[torch.Tensor, torch.Tensor], exceptions: bool = True
    ) -> None:
        self.exceptions = exceptions
        head_dim = 8 * costs[KEY].shape[-1]
        distortion = torch.tensor(
            [quantizer.codec.distortion(bits) for bits in range(9)], device=costs[KEY].device
        )
        self._tables = [
            _Table(costs[side], quantizer.layout(side, head_dim), distortion, quantizer.codec.split)
            for side in (KEY, VALUE)
        ]

    def demand(self, view: View) -> tuple[Gains, Gains]:
        """What keys and values gain by each step."""
        weight = token_weights(view.importance)[:, :, view.first : view.first + view.shape[2]]
        keys, values = (table(scale, weight) for table, scale in zip(self._tables, view.scales, strict=True))
        return keys, values

    def widths(
        self, demand: tuple[Gains, Gains], price: float, *, need: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (_climb(gains, price / need) for gains in demand)
        return keys, values

    def error(self, demand: tuple[Gains, Gains], widths: tuple[torch.Tensor, torch.Tensor]) -> float:
        """½ · Σ w · c · D(b) · scale²: c are traces of the Fisher information, see `sensitivity`."""
        lost = 0.0
        for gains, width in zip(demand, widths, strict=True):
            lost += float(gains.base.sum(dtype=torch.float64))
            for step, reached in zip(gains.steps, CODED[1:], strict=True):
                lost -= float((step * (width >= reached)).sum(dtype=torch.float64))
        return lost / 2


class _Table:
    """Cost of each width of one side, per part of the row that has a scale of its own."""

    def __init__(self, costs: torch.Tensor, layout: RowLayout, distortion: torch.Tensor, split: int) -> None:
        planes = layout.planes[list(CODED)].long().to(costs.device)
        lost = costs.unsqueeze(-2) * distortion[planes] / costs.shape[-1]  # [layers, kv_heads, widths, octets]
        parts = (lost[..., :split], lost[..., split:]) if split else (lost,)
        costs_of = torch.stack([part.sum(-1) for part in parts], -1)  # [layers, kv_heads, widths, parts]
        self._base = costs_of[:, :, 0]
        self._steps = (costs_of[:, :, :-1] - costs_of[:, :, 1:]).permute(2, 0, 1, 3)

    def __call__(self, scale: torch.Tensor, weight: torch.Tensor) -> Gains:
        """Gains of tokens of scales [layers, kv_heads, n, parts] and weights [layers, kv_heads, n]."""
        worth = (scale.square() * weight.unsqueeze(-1)).unbind(-1)
        steps = torch.empty(len(self._steps), *weight.shape, device=weight.device)
        base = torch.zeros_like(weight)
        for part, power in enumerate(worth):
            base += self._base[:, :, part, None] * power
            for out, gain in zip(steps, self._steps[..., part], strict=True):
                if part:
                    out.addcmul_(gain.unsqueeze(-1), power)
                else:
                    torch.mul(gain.unsqueeze(-1), power, out=out)
        return Gains(base, steps)


def _climb(gains: Gains, price: float) -> torch.Tensor:
    """The last width whose step gains more than its half bits cost: uint8 [layers, kv_heads, n]."""
    out = torch.zeros(gains.base.shape, dtype=torch.uint8, device=gains.base.device)
    for gain, (before, after) in zip(gains.steps, itertools.pairwise(CODED), strict=True):
        taken = (gain > price * (after - before) / 2).view(torch.uint8)
        torch.maximum(out, taken.mul_(after), out=out)
    return out


def token_weights(importance: torch.Tensor) -> torch.Tensor:
    """w_t = 0.998 · s_t / mean(s) + 0.002, with s smoothed over neighbours: tokens are looked at in passages.

    Sinks count as 0: they are exact, and their attention would drown everyone else's in the mean.

    Args:
        importance: [layers, kv_heads, length].
    """
    looked = importance.clone()
    looked[:, :, :SINKS] = 0.0
    smooth = (looked + box_mean(looked, REACH)) / 2
    return smooth * ((1 - FLOOR) / smooth.mean(-1, keepdim=True).clamp_min(1e-30)) + FLOOR


def box_mean(values: torch.Tensor, reach: int) -> torch.Tensor:
    """Mean over the positions at most `reach` away, along the last dim."""
    width = 2 * reach + 1
    sums = torch.nn.functional.pad(values.double(), (reach + 1, reach)).cumsum(-1)
    place = torch.arange(values.shape[-1], device=values.device)
    count = (place + reach).clamp_max(values.shape[-1] - 1) - (place - reach).clamp_min(0) + 1
    return ((sums[..., width:] - sums[..., :-width]) / count).float()
