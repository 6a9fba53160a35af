"""KIVI: keys quantized per channel over 32 tokens, values per token over 32 channels (arXiv 2402.02750).

A group holds its minimum and its step in half precision. The packed path knows one scale a row, so rows are
brought to the units of their groups before they are packed, with a scale of 1, and what has been unpacked is
brought back: the groups stand where a codec's outliers stand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qaq_core import Method, Quantizer
from qaq_core.allocation import FixedPolicy, NoStatistic
from qaq_core.base.errors import ConfigError, QuantizationError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache import Pair
from qaq_core.models import ModelShape
from qaq_core.quantization import IdentityTransform, Outliers, UniformCodec

NAME, PATTERN = "kivi-<bits>", r"kivi-(\d+)"
GROUP_TOKENS = 32


def parts(model: Any, shape: ModelShape, bits: int) -> dict[str, Any]:
    if not 1 <= bits <= 8:
        raise ConfigError(f"kivi takes 1 to 8 bits, not {bits}")
    return {
        "quantizer": Quantizer(IdentityTransform(), UnitCodec(bits)),
        "policy": FixedPolicy(bits, bits),
        "statistic": NoStatistic(),
        "pack_tokens": GROUP_TOKENS,
        "kind": KiviMethod,
    }


class UnitCodec(UniformCodec):
    """Numbers between 0 and 1, rounded to the nearest of 2^b that include both ends, as published.

    Codes of this one width only are meant: unlike the other codecs', they are not nested.
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
    """A method whose rows are in the units of their groups."""

    def prepare(
        self, quantizer: Quantizer, originals: torch.Tensor, start: int, overwrite: bool = False
    ) -> tuple[Pair, Pair, tuple[Outliers | None, Outliers | None]]:
        rows, metas, _ = super().prepare(quantizer, originals, start, overwrite)
        made = [Groups.of(side, row) for side, row in zip((KEY, VALUE), rows, strict=True)]
        units = (made[KEY].units(rows[KEY]), made[VALUE].units(rows[VALUE]))
        return units, metas, (made[KEY], made[VALUE])


@dataclass(frozen=True)
class Groups(Outliers):
    """Minimum and step of groups of consecutive tokens.

    Attributes:
        index: float16 minima. value: float16 ranges. Both [layers, kv_heads, tokens/32, head_dim] for keys
            ("channel") and [layers, kv_heads, tokens, head_dim/32] for values ("token").
    """

    @classmethod
    def of(cls, side: int, rows: torch.Tensor) -> Groups:
        """The groups of rows float32 [layers, kv_heads, tokens, head_dim]."""
        split, over = (_by_token(rows), 3) if side == KEY else (_by_channel(rows), -1)
        low = split.amin(over).half()
        # Of the rounded minimum, so that the smallest number is still in its cell.
        span = (split.amax(over) - low).half().clamp_min(6e-8)
        if not bool(torch.isfinite(low).all() and torch.isfinite(span).all()):
            raise QuantizationError("a group's range does not fit half precision")
        return cls(low, span, "channel" if side == KEY else "token")

    def units(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows in units of their groups."""
        low, span = self._spread(self.index, rows.shape), self._spread(self.value, rows.shape)
        return (rows - low) / span

    def apply(self, rows: torch.Tensor, layer: int, first: int) -> None:
        """Brings a layer's unpacked levels [kv_heads, tokens, head_dim] back, in place."""
        tokens = rows.shape[1]
        step = GROUP_TOKENS if self.granularity == "channel" else 1
        span = slice(first // step, -(-(first + tokens) // step))
        shape = rows.shape
        rows.mul_(self._spread(self.value[layer, :, span], shape))
        rows.add_(self._spread(self.index[layer, :, span], shape))

    def narrow(self, first: int, last: int) -> Groups:
        step = GROUP_TOKENS if self.granularity == "channel" else 1
        span = slice(first // step, last // step)
        return replace(self, index=self.index[:, :, span].clone(), value=self.value[:, :, span].clone())

    def cat(self, other: Outliers | None) -> Groups:
        assert other is not None
        index, value = torch.cat([self.index, other.index], 2), torch.cat([self.value, other.value], 2)
        return replace(self, index=index, value=value)

    def _spread(self, groups: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """One number for each of the rows' numbers, float32 of their shape."""
        dim = -2 if self.granularity == "channel" else -1
        size = GROUP_TOKENS if self.granularity == "channel" else shape[-1] // groups.shape[-1]
        return groups.float().repeat_interleave(size, dim)


def _by_token(rows: torch.Tensor) -> torch.Tensor:
    """[layers, kv_heads, tokens/32, 32, head_dim]."""
    return rows.unflatten(2, (-1, GROUP_TOKENS))


def _by_channel(rows: torch.Tensor) -> torch.Tensor:
    """[layers, kv_heads, tokens, groups, 32]; a head_dim that 32 does not divide is one group."""
    size = GROUP_TOKENS if rows.shape[-1] % GROUP_TOKENS == 0 else rows.shape[-1]
    return rows.unflatten(3, (-1, size))
