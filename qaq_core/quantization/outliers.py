"""Outliers: a group's few lowest and highest numbers, kept beside the codes in half precision.

Every group keeps equally many, so the sparse matrix needs no row pointers: indices [.., n] inside the
group and values [.., n] (arXiv 2403.04643, section 4.2). Both are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qaq_core.base.errors import QuantizationError
from qaq_core.quantization.codecs.grouped import GRANULARITIES


@dataclass(frozen=True)
class Outliers:
    """Outliers of consecutive tokens.

    Attributes:
        index: uint8, int16 or int32 [layers', kv_heads', tokens, n], place in the group's flattened dims.
        value: float16, same shape.
        granularity: "head", "layer" or "token".
    """

    index: torch.Tensor
    value: torch.Tensor
    granularity: str

    @property
    def nbytes(self) -> int:
        return self.index.untyped_storage().nbytes() + self.value.untyped_storage().nbytes()

    def cat(self, other: Outliers | None) -> Outliers:
        """These tokens followed by the other's."""
        assert other is not None
        return Outliers(
            torch.cat([self.index, other.index], 2), torch.cat([self.value, other.value], 2), self.granularity
        )

    def narrow(self, first: int, last: int) -> Outliers:
        """Tokens first..last-1."""
        return Outliers(self.index[:, :, first:last].clone(), self.value[:, :, first:last].clone(), self.granularity)

    def apply(self, rows: torch.Tensor, layer: int, first: int) -> None:
        """Writes the outliers into a layer's rows.

        Args:
            rows: float32 [kv_heads, tokens, head_dim], changed in place.
            first: the first token of `rows`, counted as in `index`.
        """
        heads, tokens, dim = rows.shape
        span = slice(first, first + tokens)
        index, value = self.index[:, :, span].long(), self.value[:, :, span].float()
        where = min(layer, index.shape[0] - 1)
        index, value = index[where], value[where]  # [heads', tokens, n]
        if self.granularity == "head":
            head = torch.arange(heads, device=rows.device)[:, None, None].expand_as(index)
            mine = torch.ones_like(index, dtype=torch.bool)
        else:
            mine = (
                (index // (heads * dim) == layer)
                if self.granularity == "token"
                else torch.ones_like(index, dtype=torch.bool)
            )
            head = (index // dim) % heads
        token = torch.arange(tokens, device=rows.device)[None, :, None].expand_as(index)
        rows[head[mine], token[mine], (index % dim)[mine]] = value[mine]


def split_outliers(rows: torch.Tensor, ratio: float, granularity: str) -> tuple[Outliers, torch.Tensor]:
    """The ratio/2 lowest and highest numbers of every group, at least one of each.

    Args:
        rows: float32 [layers, kv_heads, tokens, head_dim].
        ratio: share of numbers to keep, in (0, 1).
    Returns:
        the outliers and bool [layers, kv_heads, tokens, head_dim], True where one is.
    """
    dims = [dim % 4 for dim in GRANULARITIES[granularity]]
    rest = [dim for dim in range(4) if dim not in dims]
    moved = rows.permute(*rest, *dims)
    flat = moved.reshape(*moved.shape[: len(rest)], -1)
    count = max(1, round(flat.shape[-1] * ratio / 2))
    index = torch.cat([flat.topk(count, -1, largest=False).indices, flat.topk(count, -1).indices], -1)
    value = flat.gather(-1, index)
    if not bool((value.abs() <= torch.finfo(torch.float16).max).all()):
        raise QuantizationError("an outlier does not fit half precision")
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, index, True)
    back = [(rest + dims).index(dim) for dim in range(4)]
    shape = [1 if dim in dims else rows.shape[dim] for dim in range(3)]
    size = flat.shape[-1]
    narrow = torch.uint8 if size <= 256 else torch.int16 if size < 2**15 else torch.int32
    outliers = Outliers(
        index.to(narrow).view(*shape, 2 * count), value.to(torch.float16).view(*shape, 2 * count), granularity
    )
    return outliers, mask.view(moved.shape).permute(back)
