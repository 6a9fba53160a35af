"""Numbers, quantizers and requests that several tests use."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch

from qaq_core.base.pages import KEY, PAGE_TOKENS, VALUE, PageShape
from qaq_core.base.rows import RowRequest
from qaq_core.base.widths import HALF
from qaq_core.quantization.codecs import NormalCodec, ProgressiveCodec, UniformCodec
from qaq_core.quantization.codecs.progressive import greedy_order
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform, LinearTransform
from qaq_core.quantization.transforms.rotation import Rotation

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
GRANULARITIES = ("head", "layer", "token")


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_transform(layers: int, heads: int, dim: int, seed: int = 0, kinds: int = 1) -> LinearTransform:
    """Dense matrices that are far from singular, and far from symmetric."""
    pairs = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)
    bases = torch.tensor([10_000.0, 500.0], dtype=torch.float64)[:kinds]
    matrices = normal(seed + 3, 2, layers, heads, dim, dim) / dim**0.5 + 2 * torch.eye(dim)
    return LinearTransform(
        key_matrix=matrices[KEY].half(),
        value_matrix=matrices[VALUE].half(),
        key_mean=3 * normal(seed + 1, layers, heads, dim),
        value_mean=normal(seed + 2, layers, heads, dim),
        frequencies=bases[:, None] ** -pairs,
        kind=torch.arange(layers) % kinds,
    )


def rotation(layers: int, heads: int, dim: int, seed: int = 0) -> Rotation:
    """Random reflections, some of which reflect nothing, and octets of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-127, 128, (layers, heads, dim * (dim + 1) // 2 - 1), generator=generator)
    numbers[..., : 2 * dim - 1] *= torch.randint(0, 2, (layers, heads, 1), generator=generator)
    before, after = torch.exp2(0.3 * normal(seed, 2, layers, heads, dim // 8) - 0.5)
    return Rotation(numbers.to(torch.int8), before, after)


def rotated(model: Quantizer, seed: int = 0, mean: float = 0.0) -> Quantizer:
    """A sequence's own quantizer with means of its own, about that one, and axes."""
    assert isinstance(model.transform, LinearTransform)
    layers, heads, dim = model.transform.key_mean.shape
    own = model.centered_on(mean + normal(seed + 8, layers, 2, heads, 64, dim), 4)
    return own.rotated((rotation(layers, heads, dim, seed), rotation(layers, heads, dim, seed + 1)))


@cache
def orders(dim: int) -> tuple[list[int], list[int]]:
    """Orders of units for keys and values: costs that fall quickly, and costs that fall slowly."""
    octet = torch.arange(dim // 8)
    return greedy_order(2.0 ** (-octet / 1.5)), greedy_order(2.0 ** (-octet / 4.0))


def quantizers(layers: int, heads: int, dim: int) -> dict[str, Quantizer]:
    """Every quantizer that presets make."""
    made = {"balanced": Quantizer(linear_transform(layers, heads, dim, kinds=2), ProgressiveCodec(orders(dim)))}
    for codec in (UniformCodec, NormalCodec):
        for group in GRANULARITIES:
            made[f"{codec.name}-{group}"] = Quantizer(IdentityTransform(), codec(group))
    return made


QUANTIZER_NAMES = sorted(quantizers(1, 1, 16))


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
    page_ids: Mapping[int, bytes] | None = None,
) -> RowRequest:
    """A request for rows; `meta` [layers or 1, heads or 1, tokens from `start`, m] is of their side."""
    pages = np.unique(position // shape.tokens).tolist()
    full = meta.expand(shape.layers, shape.kv_heads, *meta.shape[2:])
    return RowRequest(
        shape=shape,
        page_ids={page: page_ids[page] if page_ids else bytes(32) for page in pages},
        layer=layer.astype(np.int16),
        head=head.astype(np.int16),
        position=position.astype(np.int32),
        side=side.astype(np.uint8),
        have=have.astype(np.uint8),
        want=want.astype(np.uint8),
        meta=full[torch.from_numpy(layer), torch.from_numpy(head), torch.from_numpy(position - start)].numpy(),
    )


def page_shape(layers: int, heads: int, dim: int, tokens: int = PAGE_TOKENS, dtype: str = "float32") -> PageShape:
    return PageShape(layers, heads, tokens, dim, dtype)


def decoded(quantizer: Quantizer, side: int, rows: torch.Tensor, meta: torch.Tensor, width: int) -> torch.Tensor:
    """What rows [n, dim] with meta [n, m] become at a width, by the codec's definition."""
    codec, dim = quantizer.codec, rows.shape[1]
    scale, offset = codec.affine(meta)
    if scale.shape[-1] == 2:
        first = (torch.arange(dim) < 8 * codec.split).expand_as(rows)
        scale = torch.where(first, scale[:, :1], scale[:, 1:])
    shift = 0.0 if offset is None else offset.unsqueeze(-1)
    units = (rows - shift) / scale
    if width == HALF:
        return units.half().float() * scale + shift
    codes = codec.codes(units)
    levels = torch.zeros_like(units)
    held = codec.order(side, dim)[: width * dim // 16].tolist()
    for octet in set(held):
        bits, dims = held.count(octet), slice(8 * octet, 8 * octet + 8)
        levels[:, dims] = codec.levels(bits)[(codes[:, dims] >> (8 - bits)).long()]
    return levels * scale + shift
