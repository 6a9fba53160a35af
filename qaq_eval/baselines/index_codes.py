"""Index codes: rows hold indices of a codebook, and parameters beside them say what an index stands for.

The packed path stores one linear scale per row and one table of levels for keys and values. Methods with scales on two
axes, or with codebooks that differ between the sides, pack plain indices instead. An index i of b bits is packed as
the number (i + ½)/2^b, the middle of one of 2^b equal cells, so that a code's first b bits are the index itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from qaq_core.base.errors import QuantizationError
from qaq_core.quantization import Outliers, UniformCodec


class IndexCodec(UniformCodec):
    """Rows of numbers from 0 to 1, without parameters of its own."""

    name = "index"
    meta_bytes = 0

    def __init__(self) -> None:
        super().__init__("head")

    def meta(self, rows: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
        return torch.empty(1, 1, rows.shape[2], 0, dtype=torch.uint8, device=rows.device)

    def affine(self, meta: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.ones(*meta.shape[:-1], 1, device=meta.device), None


def packable(index: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of `IndexCodec`, float32, of whole numbers from 0 to 2^bits - 1."""
    return (index + 0.5) / 2**bits


@dataclass(frozen=True)
class IndexParameters(Outliers):
    """What indices stand for; takes the place of a codec's outliers. Subclasses say how, in `restore`.

    Attributes:
        index, value: float16 [layers, kv_heads, entries, …], as are all tensors of `TOKENS`.
        granularity: unused.
        bits: of an index.
    """

    bits: int
    TOKENS: ClassVar[dict[str, int]] = {"index": 1, "value": 1}
    """Tokens that share an entry, by tensor."""

    def restore(self, index: torch.Tensor, layer: int, first: int) -> None:
        """Replaces indices [kv_heads, tokens, head_dim] of a layer's tokens from `first` on by rows, in place."""
        raise NotImplementedError

    def apply(self, rows: torch.Tensor, layer: int, first: int) -> None:
        """Replaces unpacked levels by rows, see `Outliers.apply`."""
        self.restore(rows.mul_(2**self.bits).sub_(0.5), layer, first)

    def of_tokens(self, name: str, layer: int, first: int, count: int) -> torch.Tensor:
        """A tensor's entries for some tokens of a layer, one per token: float32 [kv_heads, count, …]."""
        each = self.TOKENS[name]
        held = getattr(self, name)[layer, :, first // each : -(-(first + count) // each)].float()
        return held.repeat_interleave(each, 1) if each > 1 else held

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).untyped_storage().nbytes() for name in self.TOKENS)

    def narrow(self, first: int, last: int) -> IndexParameters:
        kept: dict[str, Any] = {
            name: getattr(self, name)[:, :, first // each : -(-last // each)].clone()
            for name, each in self.TOKENS.items()
        }
        return replace(self, **kept)

    def cat(self, other: Outliers | None) -> IndexParameters:
        assert other is not None
        joined: dict[str, Any] = {
            name: torch.cat([getattr(self, name), getattr(other, name)], 2) for name in self.TOKENS
        }
        return replace(self, **joined)


def half(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers in half precision.

    Raises:
        QuantizationError: one of them does not fit.
    """
    rounded = numbers.half()
    if not bool(torch.isfinite(rounded).all()):
        raise QuantizationError("a scale of a row does not fit half precision")
    return rounded
