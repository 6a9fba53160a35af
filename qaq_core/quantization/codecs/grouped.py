"""The paper's two codecs: uniform midpoint and normal quantile, on groups of a token's numbers.

A group is one head's vector, a layer's, or the whole token's (all layers), for keys and values apart
(arXiv 2403.04643, section 4.1). Its two parameters are stored as half-precision numbers.
"""

from __future__ import annotations

from functools import cache

import torch

from qaq_core.base.errors import ConfigError, QuantizationError
from qaq_core.quantization.bit_planes import round_robin
from qaq_core.quantization.codecs.base import Cells, normal_cells

GRANULARITIES = {"head": (-1,), "layer": (-3, -1), "token": (-4, -3, -1)}


@cache
def _quantiles(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels [2^b] and inner edges [2^b - 1]."""
    index = torch.arange(2**bits, dtype=torch.float64)
    return (
        torch.special.ndtri((index + 0.5) / 2**bits).float(),
        torch.special.ndtri(index[1:] / 2**bits).float(),
    )


class GroupedCodec(Cells):
    """Two half-precision numbers per group. Subclasses say which, and where the cells are."""

    name = ""
    meta_bytes = 4
    split = 0

    def __init__(self, granularity: str = "layer") -> None:
        if granularity not in GRANULARITIES:
            raise ConfigError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}")
        self.granularity = granularity

    @property
    def dims(self) -> tuple[int, ...]:
        """Dims of [layers, kv_heads, tokens, head_dim] that one group spans."""
        return GRANULARITIES[self.granularity]

    def order(self, side: int, head_dim: int) -> torch.Tensor:
        return round_robin(head_dim)

    def settings(self) -> dict[str, object]:
        return {"name": self.name, "granularity": self.granularity}

    def affine(self, meta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        pair = meta.contiguous().view(torch.float16).float()
        return pair[..., 1:], pair[..., 0]

    def _store(self, offset: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        pair = torch.stack([offset, scale], -1).squeeze(-2)
        half = pair.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            layer = int(torch.nonzero(~torch.isfinite(half))[0, 0])
            raise QuantizationError(f"layer {layer}: a group's range does not fit half precision")
        # A scale that rounds to 0 would divide by 0; the smallest subnormal keeps a constant group exact.
        half[..., 1].clamp_(min=6e-8)
        return half.contiguous().view(torch.uint8)


class UniformCodec(GroupedCodec):
    """2^b equal cells between the group's smallest and largest number; levels are their midpoints."""

    name = "uniform"
    # A number on the border of two cells is in the upper one, so the edge is just below it.
    edges = torch.nextafter(torch.arange(1, 256) / 256, torch.tensor(0.0))

    def meta(self, rows: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
        inf = float("inf")
        low = rows if excluded is None else rows.masked_fill(excluded, inf)
        high = rows if excluded is None else rows.masked_fill(excluded, -inf)
        minimum = low.amin(self.dims, keepdim=True)
        return self._store(minimum, high.amax(self.dims, keepdim=True) - minimum)

    def levels(self, bits: int) -> torch.Tensor:
        return (torch.arange(2**bits, dtype=torch.float32) + 0.5) / 2**bits

    def distortion(self, bits: int) -> float:
        return 0.0 if bits >= 16 else 4.0**-bits / 12


class NormalCodec(GroupedCodec):
    """2^b equally likely cells of a normal with the group's mean and deviation; levels at mid-probability."""

    name = "normal"
    edges = _quantiles(8)[1]

    def meta(self, rows: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
        kept = torch.ones_like(rows) if excluded is None else (~excluded).to(rows.dtype)
        count = kept.sum(self.dims, keepdim=True).clamp_min(1)
        mean = (rows * kept).sum(self.dims, keepdim=True) / count
        deviation = (((rows - mean) * kept).square().sum(self.dims, keepdim=True) / count).sqrt()
        return self._store(mean, deviation)

    def levels(self, bits: int) -> torch.Tensor:
        return _quantiles(bits)[0]

    def distortion(self, bits: int) -> float:
        if bits == 0 or bits >= 16:
            return float(bits == 0)
        return normal_cells(_quantiles(bits)[1].double())[1]
