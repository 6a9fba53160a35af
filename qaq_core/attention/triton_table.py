"""What Triton's kernels have to know of the sequences of a batch, as one table of numbers and addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qaq_core.allocation.attention_statistics import StepObserver
from qaq_core.attention.reference import LayerTokens
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import WIDTHS
from qaq_core.storage.packed import PackedTokens
from qaq_core.storage.pool import Pool

NIBBLE = 16
"""Values that a tag's nibble may have."""
STATISTICS = {"max": 1, "mean_square": 2}


class Table:
    """Made anew for every call, in one copy to the device; it keeps alive what it points to.

    Args:
        per_block: programs of a block.
        by_meta: scales are looked up by meta byte.
    Attributes:
        exact_type: of all sequences' exact tokens.
        watched: somebody wants a statistic.
    """

    def __init__(self, device: torch.device, per_block: int, sliding_window: int | None, by_meta: bool) -> None:
        self._device, self._per_block = device, per_block
        self._sliding_window, self._by_meta = sliding_window, by_meta
        self._held: list[torch.Tensor] = []
        self.exact_type = torch.float32
        self.watched = False

    def fill(self, tokens: Sequence[LayerTokens], observers: Sequence[StepObserver | None], heads: int) -> torch.Tensor:
        """int64 [batch, FIELDS] of `triton_kernels`, and behind them the addresses of rows.

        Args:
            heads: query heads.
        """
        from qaq_core.attention import triton_kernels as fields

        types = {mine.keys.dtype for mine in tokens}
        self.exact_type = types.pop() if len(types) == 1 else torch.float32
        rows = [self._rows(mine.packed, mine.layer) if mine.packed else None for mine in tokens]
        begin = fields.FIELDS.value * len(tokens)
        size = begin + sum(row.numel() for row in rows if row is not None)
        # From pinned memory a copy is part of the device's queue, and the host goes on.
        table = torch.empty(size, dtype=torch.int64, pin_memory=self._device.type != "cpu")
        on_device = torch.empty(size, dtype=torch.int64, device=self._device)
        for i, (mine, observe, row) in enumerate(zip(tokens, observers, rows, strict=True)):
            known = self._exact(mine) | self._watch(mine, observe, heads)
            if mine.packed is not None and row is not None:
                known |= self._packed(mine.packed, mine.layer)
                known["POOLS"] = on_device.data_ptr() + begin * table.itemsize
                table[begin : begin + row.numel()] = row.reshape(-1)
                begin += row.numel()
            own = [0] * fields.FIELDS.value
            for name, value in known.items():
                own[getattr(fields, name).value] = value
            table[i * len(own) : (i + 1) * len(own)] = torch.tensor(own)
        self._held.append(on_device)
        return on_device.copy_(table, non_blocking=True)

    def _exact(self, tokens: LayerTokens) -> dict[str, int]:
        keys, values = self._keep(tokens.keys.to(self.exact_type)), self._keep(tokens.values.to(self.exact_type))
        statistic = self._sliding_window
        return {
            "SINKS": tokens.sinks,
            "EXACT": keys.shape[1],
            "PACKED": tokens.packed_tokens,
            "FIRST": max(0, tokens.length - statistic) if statistic else 0,
            "KEYS": keys.data_ptr(),
            "KEYS_STRIDE": keys.stride(0),
            "VALUES": values.data_ptr(),
            "VALUES_STRIDE": values.stride(0),
        }

    def _watch(self, tokens: LayerTokens, observe: StepObserver | None, heads: int) -> dict[str, int]:
        if observe is None:
            return {}
        self.watched = True
        scores = self._keep(torch.empty(heads, tokens.length, device=self._device))
        return {
            "SCORES": scores.data_ptr(),
            "SEEN": observe.into.data_ptr(),
            "STATISTIC": STATISTICS[observe.reduction],
        }

    def _packed(self, packed: PackedTokens, layer: int) -> dict[str, int]:
        tags = packed.tags[layer]
        known = {
            "START": packed.start,
            "SPLITS": packed.blocks * self._per_block,
            "BLOCKS": packed.blocks,
            "TAGS": tags.data_ptr(),
            "TAGS_STRIDE": tags.stride(0),
        }
        for side, name in ((KEY, "KEY"), (VALUE, "VALUE")):
            for field, value in self._scales(packed, side, layer).items():
                known[f"{name}_{field}"] = value
        return known

    def _scales(self, packed: PackedTokens, side: int, layer: int) -> dict[str, int]:
        if self._by_meta:
            meta = packed.sides[side].meta
            meta = self._keep(meta[min(layer, meta.shape[0] - 1)])
            return {"META": meta.data_ptr(), "STRIDE": meta.stride(0) if len(meta) > 1 else 0}
        scale, offset = packed.affine(side, layer, 0, len(packed))
        scale = self._keep(scale.contiguous())
        known = {"SCALE": scale.data_ptr(), "STRIDE": scale.shape[1] if len(scale) > 1 else 0}
        if offset is not None:
            known["OFFSET"] = self._keep(offset.contiguous()).data_ptr()
        return known

    def _rows(self, packed: PackedTokens, layer: int) -> torch.Tensor:
        """int64 [kv_heads, blocks, 2, NIBBLE]: where a head's rows of each width begin."""
        sizes = torch.tensor([width * packed.head_dim // 16 for width in WIDTHS])
        made = torch.zeros(packed.heads, packed.blocks, 2, NIBBLE, dtype=torch.int64)
        for side in (KEY, VALUE):
            for block, pool in enumerate(packed.sides[side].pools):
                assert isinstance(pool, Pool)
                bases = [pool.rows[width].data_ptr() if width in pool.rows else 0 for width in WIDTHS]
                begin = pool.first[layer].long() * sizes
                made[:, block, side, : len(WIDTHS)] = torch.tensor(bases) + begin
        return made

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._held.append(tensor)
        return tensor
