"""Numbers, quantizers and requests that several tests use."""

from __future__ import annotations

import numpy as np
import torch

from qaq_core.codecs import GaussianCodec, NormalCodec, UniformCodec
from qaq_core.frames import PlainFrame, RotatedFrame, random_signs
from qaq_core.originals import RowRequest
from qaq_core.packing import HALF
from qaq_core.pages import PAGE_TOKENS, PageShape
from qaq_core.quantizer import Quantizer

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
GROUPS = ("head", "layer", "token")


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotated_frame(layers: int, heads: int, dim: int, seed: int = 0, kinds: int = 1) -> RotatedFrame:
    pairs = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)
    bases = torch.tensor([10_000.0, 500.0], dtype=torch.float64)[:kinds]
    return RotatedFrame(
        key_mean=3 * normal(seed + 1, layers, heads, dim),
        value_mean=normal(seed + 2, layers, heads, dim),
        frequencies=bases[:, None] ** -pairs,
        kind=torch.arange(layers) % kinds,
        signs=random_signs(dim),
    )


def quantizers(layers: int, heads: int, dim: int) -> dict[str, Quantizer]:
    """Every quantizer that presets make."""
    made = {"balanced": Quantizer(rotated_frame(layers, heads, dim, kinds=2), GaussianCodec())}
    for codec in (UniformCodec, NormalCodec):
        for group in GROUPS:
            made[f"{codec.name}-{group}"] = Quantizer(PlainFrame(), codec(group))
    return made


QUANTIZER_NAMES = sorted(quantizers(1, 1, 8))


def request(
    shape: PageShape,
    meta: torch.Tensor,
    layer: np.ndarray,
    head: np.ndarray,
    position: np.ndarray,
    side: np.ndarray,
    have: np.ndarray,
    want: np.ndarray,
    start: int = 0,
    page_ids: tuple[bytes, ...] = (),
) -> RowRequest:
    """A request for rows; `meta` [layers or 1, heads or 1, tokens from `start`, m] is of their side."""
    full = meta.expand(shape.layers, shape.kv_heads, *meta.shape[2:])
    return RowRequest(
        shape=shape,
        page_ids=page_ids,
        page=(position // shape.tokens).astype(np.int32),
        layer=layer.astype(np.int16),
        head=head.astype(np.int16),
        token=(position % shape.tokens).astype(np.int16),
        side=side.astype(np.uint8),
        position=position.astype(np.int32),
        have=have.astype(np.uint8),
        want=want.astype(np.uint8),
        meta=full[torch.from_numpy(layer), torch.from_numpy(head), torch.from_numpy(position - start)].numpy(),
    )


def page_shape(layers: int, heads: int, dim: int, tokens: int = PAGE_TOKENS, dtype: str = "float32") -> PageShape:
    return PageShape(layers, heads, tokens, dim, dtype)


def decoded(quantizer: Quantizer, rows: torch.Tensor, meta: torch.Tensor, width: int) -> torch.Tensor:
    """What rows [n, dim] with meta [n, m] become at a width, by the codec's definition."""
    scale, offset = quantizer.codec.affine(meta)
    shift = 0.0 if offset is None else offset.unsqueeze(-1)
    units = (rows - shift) / scale.unsqueeze(-1)
    if width == HALF:
        levels = units.half().float()
    elif width == 0:
        levels = torch.zeros_like(units)
    else:
        levels = quantizer.codec.levels(width)[(quantizer.codec.codes(units) >> (8 - width)).long()]
    return levels * scale.unsqueeze(-1) + shift
