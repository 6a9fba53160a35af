"""Reference attention: torch operations on any device. It defines what other kernels must compute.

A sequence's tokens stand in position order as [sinks | packed | recent]. Sinks and recent tokens are exact;
packed rows are unpacked one block of one layer at a time into a scratch buffer that all layers and
sequences share, so a dequantized copy of the cache never exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qaq_core.codecs import Codec
from qaq_core.packed import PackedTokens
from qaq_core.packing import HALF, WIDTHS, LevelTable, unpack_half
from qaq_core.pages import KEY, VALUE

QUERY_CHUNK = 256

Observer = Callable[[torch.Tensor, int], None]
"""Called with probabilities [kv_heads, group, n, tokens] and the index of the first of the n queries."""


@dataclass(frozen=True)
class LayerTokens:
    """What one layer of one sequence attends to.

    Attributes:
        keys, values: exact tokens [kv_heads, sinks + recent, head_dim].
        sinks: how many of them stand before the packed ones.
        packed: the packed tokens, or None.
    """

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    sinks: int
    packed: PackedTokens | None

    @property
    def packed_tokens(self) -> int:
        return len(self.packed) if self.packed is not None else 0

    @property
    def length(self) -> int:
        return self.keys.shape[1] + self.packed_tokens


class ReferenceAttention:
    """The operation in torch. One object per worker: it owns the lookup tables and the scratch."""

    name = "reference"

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self._tables = {w: LevelTable(codec.levels(w).to(device)) for w in WIDTHS if 0 < w < HALF}
        self._scratch = torch.empty(2, 0, device=device)

    def __call__(
        self,
        query: torch.Tensor,
        tokens: LayerTokens,
        scaling: float,
        sliding_window: int | None = None,
        observe: Observer | None = None,
    ) -> torch.Tensor:
        """Causal attention of the last n positions.

        Args:
            query: [query_heads, n, head_dim], at the last n of the layer's tokens.
            scaling: factor on the scores.
            sliding_window: how many positions back a query sees, itself included; None for all.
            observe: is shown the probabilities.
        Returns:
            float32 [query_heads, n, head_dim].
        """
        query = query.float() * scaling
        outputs = []
        for first in range(0, query.shape[1], QUERY_CHUNK):
            part = query[:, first : first + QUERY_CHUNK]
            probabilities = self._probabilities(part, tokens, query.shape[1] - first, sliding_window)
            if observe is not None:
                heads = tokens.keys.shape[0]
                observe(probabilities.view(heads, -1, *probabilities.shape[1:]), first)
            outputs.append(self._output(probabilities, tokens))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _probabilities(
        self, query: torch.Tensor, tokens: LayerTokens, from_end: int, sliding_window: int | None
    ) -> torch.Tensor:
        """[query_heads, n, length] of the queries that begin `from_end` positions before the end."""
        exact = _scores(query, tokens.keys.float())
        parts = [exact[..., : tokens.sinks], exact[..., tokens.sinks :]]
        if tokens.packed is not None:
            parts.insert(1, self._packed_scores(query, tokens.packed, tokens.layer))
        scores = torch.cat(parts, -1)
        own = torch.arange(
            tokens.length - from_end, tokens.length - from_end + query.shape[1], device=query.device
        )
        if query.shape[1] > 1:
            scores.masked_fill_(torch.arange(tokens.length, device=query.device) > own[:, None], float("-inf"))
        if sliding_window is not None and tokens.length > sliding_window:
            past = torch.arange(tokens.length, device=query.device) <= own[:, None] - sliding_window
            scores.masked_fill_(past, float("-inf"))
        return scores.softmax(-1)

    def _packed_scores(self, query: torch.Tensor, packed: PackedTokens, layer: int) -> torch.Tensor:
        frame = packed.quantizer.frame
        framed = frame.query(layer, query)
        parts = []
        for block in range(packed.blocks):
            first, last = packed.block_range(block)
            scale, offset = packed.affine(KEY, layer, first, last)
            units = self._units(packed, KEY, block, layer, scale, offset)
            scores = _scores(framed, units) * _per_query_head(scale, query.shape[0])
            if offset is not None:
                scores += framed.sum(-1, keepdim=True) * _per_query_head(offset, query.shape[0])
            parts.append(scores)
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        center = frame.center_scores(layer, query, packed.start, packed.stop)
        return scores if center is None else scores.add_(center)

    def _output(self, probabilities: torch.Tensor, tokens: LayerTokens) -> torch.Tensor:
        packed, sinks = tokens.packed, tokens.sinks
        if packed is None:
            return _weighted(probabilities, tokens.values.float())
        stop = sinks + len(packed)
        exact = torch.cat([probabilities[..., :sinks], probabilities[..., stop:]], -1)
        middle = probabilities[..., sinks:stop]
        total: torch.Tensor | None = None
        for block in range(packed.blocks):
            first, last = packed.block_range(block)
            scale, offset = packed.affine(VALUE, tokens.layer, first, last)
            units = self._units(packed, VALUE, block, tokens.layer, scale, offset)
            part = middle[..., first:last]
            summed = _weighted(part * _per_query_head(scale, part.shape[0]), units)
            if offset is not None:
                summed += (part * _per_query_head(offset, part.shape[0])).sum(-1, keepdim=True)
            total = summed if total is None else total.add_(summed)
        assert total is not None
        restored = packed.quantizer.frame.restore(tokens.layer, total, middle.sum(-1))
        return restored + _weighted(exact, tokens.values.float())

    def _units(
        self,
        packed: PackedTokens,
        side: int,
        block: int,
        layer: int,
        scale: torch.Tensor,
        offset: torch.Tensor | None,
    ) -> torch.Tensor:
        """Levels [kv_heads, tokens, head_dim] of one block of one layer, in units of each row's scale."""
        first, last = packed.block_range(block)
        shape = (packed.heads, last - first, packed.head_dim)
        size = shape[0] * shape[1] * shape[2]
        if self._scratch.shape[1] < size:
            self._scratch = torch.empty(2, size, device=packed.device)
        units, levels = self._scratch[:, :size].view(2, -1, packed.head_dim)
        which = ((packed.tags[layer, :, first:last] >> (4 * side)) & 15).reshape(-1)
        pool = packed.sides[side].pools[block]
        done = len(which) - sum(len(pool.layer(width, layer)) for width in pool.rows)
        levels[:done] = 0.0  # width 0
        for width in pool.rows:
            rows = pool.layer(width, layer)
            span = levels[done : done + len(rows)]
            if width == HALF:
                span.copy_(unpack_half(rows))
            elif len(rows):
                self._tables[width].unpack(rows, span)
            done += len(rows)
        # Rows stand by width, then position: the place of a token's row is its rank by (tag, position).
        rank = torch.empty_like(which, dtype=torch.int32)
        rank[which.argsort(stable=True)] = torch.arange(len(which), dtype=torch.int32, device=which.device)
        torch.index_select(levels, 0, rank, out=units)
        outliers = packed.sides[side].outliers
        if outliers is not None:
            outliers.apply(units.view(shape), layer, first, scale, offset)
        return units.view(shape)


def _scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q·k of query heads [query_heads, n, d] with their group's keys [kv_heads, m, d]: [query_heads, n, m]."""
    heads, n = keys.shape[0], query.shape[1]
    grouped = query.reshape(heads, -1, query.shape[-1])
    return (grouped @ keys.transpose(1, 2)).view(-1, n, keys.shape[1])


def _weighted(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Σ w·v of weights [query_heads, n, m] with their group's values [kv_heads, m, d]: [query_heads, n, d]."""
    heads, n = values.shape[0], weights.shape[1]
    return (weights.reshape(heads, -1, weights.shape[-1]) @ values).view(-1, n, values.shape[-1])


def _per_query_head(row: torch.Tensor, query_heads: int) -> torch.Tensor:
    """[kv_heads or 1, m] as [query_heads or 1, 1, m]."""
    if row.shape[0] > 1:
        row = row.repeat_interleave(query_heads // row.shape[0], 0)
    return row.unsqueeze(1)
