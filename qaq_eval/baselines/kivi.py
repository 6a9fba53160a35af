"""KIVI: keys quantized per channel over 32 tokens, values per token over 32 channels (arXiv 2402.02750).

A block of 32 numbers has its minimum and its range in half precision. The packed path stores one scale per row, so
rows are normalized by their blocks before they are packed, with a scale of 1, and denormalized after they are
unpacked. The blocks' parameters take the place of a codec's outliers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qaq_core import Method, Quantizer, Target
from qaq_core.allocation import FixedPolicy, NoStatistic
from qaq_core.base.errors import ConfigError, QuantizationError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache import Pair
from qaq_core.models import ModelShape
from qaq_core.quantization import IdentityTransform, Outliers, UniformCodec

NAME, PATTERN, TAKES_TARGET = "kivi-<bits>", r"kivi-(\d+)", False
BLOCK = 32
"""Numbers in a block: tokens of a key channel, or channels of a value."""


def preset(model: Any, shape: ModelShape, target: Target, bits: int) -> dict[str, Any]:
    if not 1 <= bits <= 8:
        raise ConfigError(f"kivi takes 1 to 8 bits, not {bits}")
    return {
        "quantizer": Quantizer(IdentityTransform(), UnitCodec(bits)),
        "policy": FixedPolicy(bits, bits),
        "statistic": NoStatistic(),
        "pack_tokens": BLOCK,
        "kind": KiviMethod,
    }


class UnitCodec(UniformCodec):
    """Numbers from 0 to 1, rounded to the nearest of 2^b levels that include both ends, as published.

    The codes have one width. Unlike other codecs' codes they cannot be truncated to fewer bits.
    """

    name = "kivi"
    meta_bytes = 0

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def meta(self, rows: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
        return torch.empty(1, 1, rows.shape[2], 0, dtype=torch.uint8, device=rows.device)

    def affine(self, meta: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.ones(*meta.shape[:-1], 1, device=meta.device), None

    def codes(self, units: torch.Tensor) -> torch.Tensor:
        top = 2**self.bits - 1
        return (units * top).round().clamp_(0, top).to(torch.uint8) << (8 - self.bits)

    def levels(self, bits: int) -> torch.Tensor:
        return torch.linspace(0, 1, 2**bits)

    def settings(self) -> dict[str, object]:
        return {"name": self.name, "bits": self.bits}


@dataclass(frozen=True)
class KiviMethod(Method):
    """A method that normalizes rows by their blocks before they are packed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pack_tokens % BLOCK:
            raise ConfigError(f"kivi packs blocks of {BLOCK} tokens: the residual window must be a multiple of that")

    def prepare(
        self, quantizer: Quantizer, originals: torch.Tensor, start: int, overwrite: bool = False
    ) -> tuple[Pair, Pair, tuple[Outliers | None, Outliers | None]]:
        rows, metas, _ = super().prepare(quantizer, originals, start, overwrite)
        keys, values = (BlockScales.of(side, rows[side]) for side in (KEY, VALUE))
        return (keys.normalize(rows[KEY]), values.normalize(rows[VALUE])), metas, (keys, values)


@dataclass(frozen=True)
class BlockScales(Outliers):
    """Minimum and range of blocks.

    Attributes:
        index: float16 minima. value: float16 ranges. Both [layers, kv_heads, tokens/32, head_dim] for keys
            ("channel") and [layers, kv_heads, tokens, head_dim/32] for values ("token").
    """

    @classmethod
    def of(cls, side: int, rows: torch.Tensor) -> BlockScales:
        """The scales of rows float32 [layers, kv_heads, tokens, head_dim]."""
        blocks, dim = (_token_blocks(rows), 3) if side == KEY else (_channel_blocks(rows), -1)
        low = blocks.amin(dim).half()
        # The range is measured from the rounded minimum, so that the smallest number is inside it.
        span = (blocks.amax(dim) - low).half().clamp_min(6e-8)
        if not bool(torch.isfinite(low).all() and torch.isfinite(span).all()):
            raise QuantizationError("the range of a block does not fit half precision")
        return cls(low, span, "channel" if side == KEY else "token")

    def normalize(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as numbers from 0 to 1."""
        low, span = self._expand(self.index, rows.shape), self._expand(self.value, rows.shape)
        return (rows - low) / span

    def apply(self, rows: torch.Tensor, layer: int, first: int) -> None:
        """Denormalizes a layer's unpacked levels [kv_heads, tokens, head_dim], in place."""
        tokens = rows.shape[1]
        step = BLOCK if self.granularity == "channel" else 1
        span = slice(first // step, -(-(first + tokens) // step))
        shape = rows.shape
        rows.mul_(self._expand(self.value[layer, :, span], shape))
        rows.add_(self._expand(self.index[layer, :, span], shape))

    def narrow(self, first: int, last: int) -> BlockScales:
        step = BLOCK if self.granularity == "channel" else 1
        span = slice(first // step, last // step)
        return replace(self, index=self.index[:, :, span].clone(), value=self.value[:, :, span].clone())

    def cat(self, other: Outliers | None) -> BlockScales:
        assert other is not None
        index, value = torch.cat([self.index, other.index], 2), torch.cat([self.value, other.value], 2)
        return replace(self, index=index, value=value)

    def _expand(self, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The scale of every number in rows of a shape, float32 of that shape."""
        dim = -2 if self.granularity == "channel" else -1
        size = BLOCK if self.granularity == "channel" else shape[-1] // scales.shape[-1]
        return scales.float().repeat_interleave(size, dim)


def _token_blocks(rows: torch.Tensor) -> torch.Tensor:
    """[layers, kv_heads, tokens/32, 32, head_dim]."""
    return rows.unflatten(2, (-1, BLOCK))


def _channel_blocks(rows: torch.Tensor) -> torch.Tensor:
    """[layers, kv_heads, tokens, blocks, 32]; one block if 32 does not divide head_dim."""
    size = BLOCK if rows.shape[-1] % BLOCK == 0 else rows.shape[-1]
    return rows.unflatten(3, (-1, size))
