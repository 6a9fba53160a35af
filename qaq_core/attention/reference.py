"""Reference attention: torch operations on any device. It defines what other kernels must compute.

A sequence's tokens stand in position order as [sinks | packed | recent]. Sinks and recent tokens are not quantized;
packed rows are unpacked one block of one layer at a time into a scratch buffer that all layers and
sequences share, so a dequantized copy of the cache never exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qaq_core.allocation.attention_statistics import Observer, StepObserver
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF
from qaq_core.quantization.bit_planes import LevelTable, RowLayout, unpack_half, width_index
from qaq_core.quantization.codecs import Codec
from qaq_core.storage.packed import BLOCK_TOKENS, PackedTokens

QUERY_CHUNK = 256


@dataclass(frozen=True)
class LayerTokens:
    """The tokens of one layer of one sequence.

    Attributes:
        keys, values: the residual window [kv_heads, sinks + recent, head_dim].
        sinks: number of them before the packed tokens.
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
        self._levels = [codec.levels(bits) for bits in range(1, 9)]
        self._tables: dict[RowLayout, LevelTable] = {}
        self._scratch = torch.empty(2, 0, device=device)

    def __call__(
        self,
        query: torch.Tensor,
        tokens: LayerTokens,
        scaling: float,
        sliding_window: int | None = None,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """Causal attention of the last n positions.

        Args:
            query: [query_heads, n, head_dim], at the last n of the layer's tokens.
            scaling: factor on the scores.
            sliding_window: positions that a query sees, itself included; None for all.
            observer: is called with the probabilities.
        Returns:
            float32 [query_heads, n, head_dim].
        """
        query = query.float() * scaling
        outputs = []
        for first in range(0, query.shape[1], QUERY_CHUNK):
            part = query[:, first : first + QUERY_CHUNK]
            scores = self._masked_scores(part, tokens, query.shape[1] - first, sliding_window)
            probabilities = scores.softmax(-1)
            if isinstance(observer, StepObserver) and observer.log_sums is not None:
                observer.log_sums.copy_(scores.logsumexp(-1)[:, 0])
            if observer is not None:
                heads = tokens.keys.shape[0]
                observer(probabilities.view(heads, -1, *probabilities.shape[1:]), first)
            outputs.append(self._output(probabilities, tokens))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def batch(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[Observer | None],
    ) -> torch.Tensor:
        """See `Attention`."""
        each = zip(query, tokens, observers, strict=True)
        return torch.stack([self(one, mine, scaling, sliding_window, observer) for one, mine, observer in each])

    def rows_at(
        self, packed: PackedTokens, side: int, layer: int, head: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:
        """Some packed rows of a layer, dequantized but not transformed back: float32 [n, head_dim].

        Args:
            head, token: int64 [n]; tokens count from the first packed one. The codec keeps no offsets and outliers.
        """
        levels = torch.zeros(len(head), packed.head_dim, device=packed.device)
        for block in token.div(BLOCK_TOKENS, rounding_mode="floor").unique().tolist():
            first, last = packed.block_range(block)
            here = torch.nonzero((token >= first) & (token < last)).squeeze(1)
            pool, tags = packed.sides[side].pools[block], packed.tags[layer, :, first:last]
            for width, which, raw in pool.take_at(tags, side, layer, head[here], token[here] - first):
                levels[here[which]] = self.levels(packed, side, raw, width)
        position = token + packed.start
        meta = packed.meta_at(side, torch.full_like(head, layer), head, position)
        return levels * packed.quantizer.spread(packed.quantizer.codec.affine(meta)[0], packed.head_dim)

    def levels(self, packed: PackedTokens, side: int, raw: torch.Tensor, width: int) -> torch.Tensor:
        """The levels of rows of one width, uint8 [n, bytes], in the layout of packed tokens: float32 [n, head_dim]."""
        if width == HALF:
            return unpack_half(raw)
        levels = torch.empty(len(raw), packed.head_dim, device=raw.device)
        self._table(packed, side).unpack(raw, width, levels)
        return levels

    def unpack(self, packed: PackedTokens, side: int, layer: int) -> torch.Tensor:
        """All packed rows of a layer, dequantized but not transformed back: float32 [kv_heads, tokens, head_dim]."""
        return torch.cat([self._rows(packed, side, block, layer).clone() for block in range(packed.blocks)], 1)

    def _masked_scores(
        self, query: torch.Tensor, tokens: LayerTokens, from_end: int, sliding_window: int | None
    ) -> torch.Tensor:
        """[query_heads, n, length] of the queries that begin `from_end` positions before the end."""
        exact = _scores(query, tokens.keys.float())
        parts = [exact[..., : tokens.sinks], exact[..., tokens.sinks :]]
        if tokens.packed is not None:
            parts.insert(1, self._packed_scores(query, tokens.packed, tokens.layer))
        scores = torch.cat(parts, -1)
        own = torch.arange(tokens.length - from_end, tokens.length - from_end + query.shape[1], device=query.device)
        if query.shape[1] > 1:
            scores.masked_fill_(torch.arange(tokens.length, device=query.device) > own[:, None], float("-inf"))
        if sliding_window is not None and tokens.length > sliding_window:
            past = torch.arange(tokens.length, device=query.device) <= own[:, None] - sliding_window
            scores.masked_fill_(past, float("-inf"))
        return scores

    def _packed_scores(self, query: torch.Tensor, packed: PackedTokens, layer: int) -> torch.Tensor:
        transform = packed.quantizer.transform
        transformed = transform.query(layer, query)
        parts = [_scores(transformed, self._rows(packed, KEY, block, layer)) for block in range(packed.blocks)]
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        center = transform.center_scores(layer, query, packed.start, packed.stop)
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
            summed = _weighted(middle[..., first:last], self._rows(packed, VALUE, block, tokens.layer))
            total = summed if total is None else total.add_(summed)
        assert total is not None
        transform = packed.quantizer.transform
        restored = transform.restore(tokens.layer, total)
        center = transform.value_center(tokens.layer)
        if center is not None:
            mass = middle.sum(-1).view(len(center), -1, 1)
            restored = restored + (mass * center.unsqueeze(1)).view(restored.shape)
        return restored + _weighted(exact, tokens.values.float())

    def _rows(self, packed: PackedTokens, side: int, block: int, layer: int) -> torch.Tensor:
        """Rows [kv_heads, tokens, head_dim] of one block of one layer; valid until the next call."""
        first, last = packed.block_range(block)
        shape = (packed.heads, last - first, packed.head_dim)
        size = shape[0] * shape[1] * shape[2]
        if self._scratch.shape[1] < size:
            self._scratch = torch.empty(2, size, device=packed.device)
        rows, levels = self._scratch[:, :size].view(2, -1, packed.head_dim)
        which = width_index(packed.tags[layer, :, first:last], side).reshape(-1)
        pool, table = packed.sides[side].pools[block], self._table(packed, side)
        rows_of = pool.of_layer(packed.tags[layer, :, first:last], side, layer)
        done = len(which) - sum(len(held) for held in rows_of.values())
        levels[:done] = 0.0  # width 0
        for width, held in rows_of.items():
            span = levels[done : done + len(held)]
            if width == HALF:
                span.copy_(unpack_half(held))
            elif len(held):
                table.unpack(held, width, span)
            done += len(held)
        # Rows stand by width, then position: the place of a token's row is its rank by (tag, position).
        rank = torch.empty_like(which, dtype=torch.int32)
        rank[which.argsort(stable=True)] = torch.arange(len(which), dtype=torch.int32, device=which.device)
        torch.index_select(levels, 0, rank, out=rows)
        rows = rows.view(shape)
        scale, offset = packed.affine(side, layer, first, last)
        rows.mul_(packed.quantizer.spread(scale, packed.head_dim))
        if offset is not None:
            rows.add_(offset.unsqueeze(-1))
        outliers = packed.sides[side].outliers
        if outliers is not None:
            outliers.apply(rows, layer, first)
        return rows

    def _table(self, packed: PackedTokens, side: int) -> LevelTable:
        layout = packed.quantizer.layout(side, packed.head_dim)
        if layout not in self._tables:
            self._tables[layout] = LevelTable(self._levels, layout, packed.device)
        return self._tables[layout]


def _scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q·k of query heads [query_heads, n, d] with their group's keys [kv_heads, m, d]: [query_heads, n, m]."""
    heads, n = keys.shape[0], query.shape[1]
    grouped = query.reshape(heads, -1, query.shape[-1])
    return (grouped @ keys.transpose(1, 2)).view(-1, n, keys.shape[1])


def _weighted(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Σ w·v of weights [query_heads, n, m] with their group's values [kv_heads, m, d]: [query_heads, n, d]."""
    heads, n = values.shape[0], weights.shape[1]
    return (weights.reshape(heads, -1, weights.shape[-1]) @ values).view(-1, n, values.shape[-1])
