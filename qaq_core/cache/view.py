"""A view of a cache: what it holds of each token and in each layer, for somebody who watches it being used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qaq_core.allocation.requantize import RowLog
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache.tokens import SequenceTokens

EIGHTHS = 8
"""A number of a grid is in eighths of a bit."""


@dataclass(frozen=True)
class CacheView:
    """What a sequence held between two forward passes.

    Attributes:
        length: tokens of the sequence.
        packed: positions from the first packed token to behind the last; the others are in the residual window.
        first: position of the first of the n tokens that are told one by one.
        bits: of keys and of values, float32 [n]: bits an element, means over layers and KV heads.
        attention: float32 [n], the attention statistic's importance, means over layers and KV heads.
        asked, answered: int32 [n], see `RowLog`.
        grids: of keys and of values, uint8 [layers, columns]: mean bits an element, in eighths. Column c has the tokens
            from c · length // columns on: those of them that are packed, or where none is, the others.
    """

    length: int
    packed: tuple[int, int]
    first: int
    bits: tuple[np.ndarray, np.ndarray]
    attention: np.ndarray
    asked: np.ndarray
    answered: np.ndarray
    grids: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, sequence: SequenceTokens, tokens: int, columns: int) -> CacheView:
        """The view of a sequence between two forward passes. From the first one on, its exceptions are logged.

        Args:
            tokens: most tokens that are told one by one: the last ones.
            columns: most columns of the grids.
        """
        length, packed, requantizer = sequence.length, sequence.packed, sequence.requantizer
        if requantizer.log is None:
            requantizer.log = RowLog()
        first = max(0, length - tokens)
        widths = [_widths(sequence, side) for side in (KEY, VALUE)]
        keys, values = (each[:, first:].float().mean(0) / 2 for each in widths)
        start, stop = (packed.start, packed.stop) if len(packed) else (length, length)
        return cls(
            length=length,
            packed=(start, stop),
            first=first,
            bits=(keys.numpy(), values.numpy()),
            attention=_attention(sequence, first),
            asked=requantizer.log.asked(first, length),
            answered=requantizer.log.answered(first, length),
            grids=(_grid(widths[KEY], columns, start, stop), _grid(widths[VALUE], columns, start, stop)),
        )


def _widths(sequence: SequenceTokens, side: int) -> torch.Tensor:
    """float32 [layers, length] in half bits, means over the KV heads."""
    packed, residual = sequence.packed, 16.0 * sequence.method.residual_dtype.itemsize
    held = torch.full((sequence.method.shape.layers, sequence.length), residual)
    if len(packed):
        held[:, packed.start : packed.stop] = packed.widths(side).sum(1, dtype=torch.int32).cpu() / packed.heads
    return held


def _attention(sequence: SequenceTokens, first: int) -> np.ndarray:
    """float32 [n] of the tokens from `first` on; 0 of those that the statistic does not know yet."""
    seen = np.zeros(sequence.length - first, dtype=np.float32)
    known = sequence.importance.view(sequence.length, first)
    seen[: known.shape[2]] = known.mean((0, 1)).cpu().numpy()
    return seen


def _grid(widths: torch.Tensor, columns: int, start: int, stop: int) -> np.ndarray:
    """Means over each column's packed tokens, start..stop-1, of half bits [layers, length], in eighths of a bit. A
    column without any has the mean of all its tokens."""
    layers, length = widths.shape
    columns = min(columns, length)
    if not columns:
        return np.zeros((layers, 0), dtype=np.uint8)
    edges = torch.arange(columns + 1) * length // columns
    sums = torch.zeros(layers, length + 1, dtype=torch.float64)
    torch.cumsum(widths, 1, out=sums[:, 1:])
    first, last = edges[:-1].clone(), edges[1:].clone()
    mixed = torch.minimum(last, torch.tensor(stop)) > torch.maximum(first, torch.tensor(start))
    first[mixed], last[mixed] = first[mixed].clamp(min=start), last[mixed].clamp(max=stop)
    means = (sums[:, last] - sums[:, first]) / (last - first)
    return (means * (EIGHTHS / 2)).round().clamp(0, 255).to(torch.uint8).numpy()
