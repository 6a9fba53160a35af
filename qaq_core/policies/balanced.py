"""The balanced policy: every vector gets the bits at which the next bit is worth its price.

    b* = argmin_b  κ · m · w_t · D(b) · scale² + λ · b

m is the model's sensitivity to errors in that layer and head (calibrated once per model), w_t the token's
predicted attention relative to its head's mean, D(b) the codec's distortion at b bits, λ the price. Since
D is convex in b, b* only depends on u = κ·m·w·scale²/λ, by thresholds.
"""

from __future__ import annotations

import itertools

import torch

from qaq_core.codecs import Codec
from qaq_core.policies.base import View

KEY_WIDTHS = (1, 2, 3, 4, 5, 6, 8)
VALUE_WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8)
KAPPA = (1.5, 1.0)
FLOOR = 0.002
REACH = 16
SINKS = 4


class BalancedPolicy:
    """Sensitivity-weighted allocation with one price.

    Args:
        codec: gives D(b).
        sensitivity: for keys and values, float32 [layers, kv_heads].
    """

    hysteresis = 2.0
    every = 4
    narrow_every = 16
    price = 1e-9

    def __init__(
        self, codec: Codec, sensitivity: tuple[torch.Tensor, torch.Tensor], exceptions: bool = True
    ) -> None:
        self.exceptions = exceptions
        self._weights = [(kappa * m).unsqueeze(-1) for kappa, m in zip(KAPPA, sensitivity, strict=True)]
        self._distortion = torch.tensor([codec.distortion(bits) for bits in range(9)], device=sensitivity[0].device)
        self._choices = [_Choice(codec, widths) for widths in (KEY_WIDTHS, VALUE_WIDTHS)]

    def demand(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """κ · m · w · scale² of keys and of values."""
        weight = token_weights(view.importance)[:, :, view.first : view.first + view.shape[2]]
        keys, values = (
            side * scale.square() * weight for side, scale in zip(self._weights, view.scales, strict=True)
        )
        return keys, values

    def widths(
        self, demand: tuple[torch.Tensor, torch.Tensor], price: float, *, need: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (choice(worth, price / need) for choice, worth in zip(self._choices, demand, strict=True))
        return keys, values

    def error(self, demand: tuple[torch.Tensor, torch.Tensor], widths: tuple[torch.Tensor, torch.Tensor]) -> float:
        """½ · Σ κ · m · w · D(b) · scale²: m is a trace of the Fisher information, see `sensitivity`."""
        lost = (worth * self._distortion[width.int()] for worth, width in zip(demand, widths, strict=True))
        return sum(float(side.sum(dtype=torch.float64)) for side in lost) / 2


class _Choice:
    """Width by u: b_i gives way to b_{i+1} where u passes (b_{i+1} - b_i) / (D(b_i) - D(b_{i+1}))."""

    def __init__(self, codec: Codec, widths: tuple[int, ...]) -> None:
        steps = [
            (after - before) / (codec.distortion(before) - codec.distortion(after))
            for before, after in itertools.pairwise(widths)
        ]
        self._thresholds = steps
        self._steps = [(after - before) for before, after in itertools.pairwise(widths)]
        self._least = widths[0]

    def __call__(self, worth: torch.Tensor, price: float) -> torch.Tensor:
        out = torch.full(worth.shape, self._least, dtype=torch.uint8, device=worth.device)
        for threshold, step in zip(self._thresholds, self._steps, strict=True):
            passed = (worth > threshold * price).view(torch.uint8)
            out += passed if step == 1 else passed * step
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
