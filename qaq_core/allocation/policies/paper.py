"""The paper's policy: keys by the softmax bound, values by their attention (arXiv 2403.04643, section 4.1).

    values  σ_V(t) <= σ_X / (√T · S_t)
    keys    σ_K²   <= ln(T³/(T-1) · σ_S² + 1) / ‖q‖²
    bits    B = ⌈log2((max - min) / (2√3 · σ))⌉, clipped to [min, max]

S_t is the attention window's maximum over the group (a head, a layer or all of a token), ‖q‖² the calibrated upper
10% quantile of each head's squared query norm. λ divides both target errors' inverse: σ_X and σ_S
are multiplied by it.
"""

from __future__ import annotations

import torch

from qaq_core.allocation.policies.base import View
from qaq_core.base.errors import ConfigError


class PaperPolicy:
    """QAQ as published.

    Args:
        query_norm: float32 [layers, kv_heads], calibrated ‖q‖².
        dims: dims of [layers, kv_heads, tokens, head_dim] that one group spans, see `GroupedCodec.dims`.
        sigma_x, sigma_s: tolerated standard deviation of the output's and the attention's error.
        normal: the codec is the normal one, whose scale is a deviation; its range is taken as ±3 of them.
    """

    elastic = False
    every = narrow_every = 1
    hysteresis = rise = 1.0
    lam = 1.0

    def __init__(
        self,
        query_norm: torch.Tensor,
        dims: tuple[int, ...],
        sigma_x: float = 0.02,
        sigma_s: float = 0.002,
        bits: tuple[int, int] = (1, 8),
        normal: bool = False,
        exceptions: bool = True,
    ) -> None:
        pair = isinstance(bits, tuple | list) and len(bits) == 2 and all(type(limit) is int for limit in bits)
        if not pair or not 1 <= bits[0] <= bits[1] <= 8:
            raise ConfigError(f"the paper preset takes 1 <= min <= max <= 8 bits, both whole, not {bits!r}")
        self.query_norm, self.bits, self.exceptions = query_norm, bits, exceptions
        self.sigma_x, self.sigma_s = sigma_x, sigma_s
        self.dims = tuple(dim + 4 for dim in dims if dim != -1)
        self.range_scale = 6.0 if normal else 1.0

    def demand(self, view: View) -> View:
        return view

    def widths(self, demand: View, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        view = demand
        tokens = view.importance.shape[2]
        n = view.shape[2]
        attention = view.importance[:, :, view.first : view.first + n] * need
        norms = self.query_norm.unsqueeze(-1)
        if self.dims:
            attention, norms = attention.amax(self.dims, keepdim=True), norms.amax(self.dims, keepdim=True)
        keys = 2 * self.bits_of(view.scales[0][..., 0], key_deviation(tokens, self.sigma_s * lam, norms))
        values = 2 * self.bits_of(view.scales[1][..., 0], value_deviation(tokens, self.sigma_x * lam, attention))
        return keys.expand(view.shape).contiguous(), values.expand(view.shape).contiguous()

    def bits_of(self, scale: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        """B = ⌈log2((max - min) / (2√3 · σ))⌉ within the limits, uint8."""
        return bits_for(scale * self.range_scale, deviation).clamp_(*self.bits).to(torch.uint8)


def value_deviation(tokens: int, sigma_x: float, attention: torch.Tensor) -> torch.Tensor:
    """σ_V(t) = σ_X / (√T · S_t)."""
    return sigma_x / (tokens**0.5 * attention.clamp_min(1e-12))


def key_deviation(tokens: int, sigma_s: float, query_norm: torch.Tensor) -> torch.Tensor:
    """σ_K = √(ln(T³/(T-1) · σ_S² + 1) / ‖q‖²)."""
    growth = torch.tensor(tokens**3 / max(tokens - 1, 1) * sigma_s**2, dtype=torch.float64)
    return (torch.log1p(growth).float() / query_norm.clamp_min(1e-12)).sqrt()


def bits_for(value_range: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """⌈log2((max - min) / (2√3 · σ))⌉: a uniform error over a cell of width 2√3·σ has deviation σ."""
    return (value_range.clamp_min(1e-12) / (2 * 3**0.5 * deviation)).log2().ceil()
