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
KAPPA = (1 / 3, 1.0)
FLOOR = 0.002
REACH = 16


class BalancedPolicy:
    """Sensitivity-weighted allocation with one price.

    Args:
        codec: gives D(b).
        sensitivity: for keys and values, float32 [layers, kv_heads].
    """

    hysteresis = 2.0
    every = 4
    price = 1e-9

    def __init__(
        self, codec: Codec, sensitivity: tuple[torch.Tensor, torch.Tensor], exceptions: bool = True
    ) -> None:
        self.exceptions = exceptions
        self._weights = [(kappa * m).unsqueeze(-1) for kappa, m in zip(KAPPA, sensitivity, strict=True)]
        device = sensitivity[0].device
        self._choices = [_Choice(codec, widths, device) for widths in (KEY_WIDTHS, VALUE_WIDTHS)]

    def widths(self, view: View, price: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        weight = token_weights(view.importance)[:, :, view.first : view.first + view.shape[2]]
        keys, values = (
            choice(side * weight * scale.square() * (need / price))
            for choice, side, scale in zip(self._choices, self._weights, view.scales, strict=True)
        )
        return keys, values


class _Choice:
    """Width by u: b_i gives way to b_{i+1} where u passes (b_{i+1} - b_i) / (D(b_i) - D(b_{i+1}))."""

    def __init__(self, codec: Codec, widths: tuple[int, ...], device: torch.device) -> None:
        steps = [
            (after - before) / (codec.distortion(before) - codec.distortion(after))
            for before, after in itertools.pairwise(widths)
        ]
        self._thresholds = torch.tensor(steps, device=device)
        self._widths = torch.tensor(widths, dtype=torch.uint8, device=device)

    def __call__(self, worth: torch.Tensor) -> torch.Tensor:
        return self._widths[torch.bucketize(worth, self._thresholds, out_int32=True).int()]


def token_weights(importance: torch.Tensor) -> torch.Tensor:
    """w_t = 0.998 · s_t / mean(s) + 0.002, with s smoothed over neighbours: tokens are looked at in passages.

    Args:
        importance: [layers, kv_heads, length].
    """
    smooth = (importance + box_mean(importance, REACH)) / 2
    return smooth * ((1 - FLOOR) / smooth.mean(-1, keepdim=True).clamp_min(1e-30)) + FLOOR


def box_mean(values: torch.Tensor, reach: int) -> torch.Tensor:
    """Mean over the positions at most `reach` away, along the last dim."""
    length = values.shape[-1]
    sums = torch.nn.functional.pad(values.double().cumsum(-1), (1, 0))
    place = torch.arange(length, device=values.device)
    first, last = (place - reach).clamp_min(0), (place + reach + 1).clamp_max(length)
    return ((sums[..., last] - sums[..., first]) / (last - first)).float()
