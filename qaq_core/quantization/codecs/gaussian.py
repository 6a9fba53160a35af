"""Embedded Gaussian codes: one set of nested cells serves every width.

Cell edges at b bits are s·Φ⁻¹(i/2^b), the cube-root compander of a Gaussian, so that the b-bit cells are
unions of the finer ones; levels are the cells' centroids. Against separate Lloyd–Max codebooks this costs
about 1% of mean squared error and makes narrowing a row exact: it drops bit planes.
"""

from __future__ import annotations

from functools import cache

import torch

from qaq_core.base.constants import constant_on
from qaq_core.base.errors import QuantizationError
from qaq_core.quantization.bit_planes import round_robin
from qaq_core.quantization.codecs.base import Cells, normal_cells, part_rms

COMPANDER = 1.57
LOG2_MIN, LOG2_MAX = -16.0, 12.0
_STEP = (LOG2_MAX - LOG2_MIN) / 255
BYTE_BITS = 5
"""Levels of up to so many bits stand on a grid of 256 places, so that kernels may multiply bytes. It adds 0.2% to
the mean squared error of 4 bits and 2% to that of 5."""


class GaussianCodec(Cells):
    """Rows that are close to Gaussian after rotation; scale = rms as an 8-bit log code, one per row."""

    name = "gaussian"
    meta_bytes = 1
    split = 0

    def __init__(self) -> None:
        steps = torch.arange(256, dtype=torch.float64)
        self._scales = torch.exp2(LOG2_MIN + _STEP * steps).float()
        self.edges = _edges(8).float()

    def order(self, side: int, head_dim: int) -> torch.Tensor:
        return round_robin(head_dim)

    def meta(self, rows: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
        return self.meta_of(part_rms(rows, self.split))

    def meta_of(self, rms: torch.Tensor) -> torch.Tensor:
        """Meta bytes [..., meta_bytes] of rows whose parts have these root mean squares [..., 1 or 2]."""
        if rms.numel() and float(rms.max()) > 2.0**LOG2_MAX:
            layer = int(torch.nonzero(rms > 2.0**LOG2_MAX)[0, 0])
            raise QuantizationError(f"layer {layer}: a row's rms {float(rms.max()):.3g} is over {2**LOG2_MAX:.0f}")
        code = ((rms.clamp_min(2.0**LOG2_MIN).log2() - LOG2_MIN) / _STEP).round()
        return code.to(torch.uint8)

    def affine(self, meta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return constant_on(self._scales, meta.device)[meta.long()], None

    def levels(self, bits: int) -> torch.Tensor:
        return cells(bits)[0].float()

    def distortion(self, bits: int) -> float:
        return cells(bits)[1]

    def settings(self) -> dict[str, object]:
        return {"name": self.name}


def _edges(bits: int) -> torch.Tensor:
    return COMPANDER * torch.special.ndtri(torch.arange(1, 2**bits, dtype=torch.float64) / 2**bits)


@cache
def cells(bits: int) -> tuple[torch.Tensor, float]:
    """Levels and distortion at b bits; half precision counts as exact."""
    if bits >= 16:
        return torch.empty(0, dtype=torch.float64), 0.0
    edges = _edges(bits)
    levels, error = normal_cells(edges)
    if not 0 < bits <= BYTE_BITS:
        return levels, error
    step = (levels[-1] - levels[0]) / 255
    on_grid = ((levels - levels[0]) / step).round() * step + levels[0]
    below = torch.special.ndtr(torch.cat([edges, torch.tensor([torch.inf])]))
    mass = below.diff(prepend=torch.zeros(1))
    return on_grid, error + float((mass * (on_grid - levels) ** 2).sum())
