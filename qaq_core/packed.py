"""Packed tokens: everything one sequence holds of the tokens that have left its recent window.

Side by side, in position order: one tag byte per (layer, kv_head, token) that names the width of the key
and of the value, the codecs' meta bytes, and the outliers of codecs that keep some. The rows themselves
are in pools, a key pool and a value pool per block of tokens. Widths of keys and values are free of each
other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qaq_core.outliers import Outliers
from qaq_core.packing import HALF, WIDTHS, pack, unpack_half
from qaq_core.pages import KEY, VALUE
from qaq_core.pool import Pool, Rows
from qaq_core.quantizer import Quantizer

BLOCK_TOKENS = 2048

_INDEX = torch.zeros(HALF + 1, dtype=torch.uint8)
_INDEX[list(WIDTHS)] = torch.arange(len(WIDTHS), dtype=torch.uint8)
_WIDTH = torch.tensor(WIDTHS, dtype=torch.uint8)


@dataclass
class Side:
    """What keys and values each have: meta bytes [layers or 1, kv_heads or 1, tokens, m], outliers, pools."""

    meta: torch.Tensor
    outliers: Outliers | None
    pools: list[Pool]


class PackedTokens:
    """The packed tokens of one sequence.

    Args:
        shape: (layers, kv_heads, head_dim).
        start: position of the first token that will be packed.
    """

    def __init__(
        self, quantizer: Quantizer, shape: tuple[int, int, int], start: int, device: torch.device
    ) -> None:
        self.quantizer, self.start, self.device = quantizer, start, device
        self.layers, self.heads, self.head_dim = shape
        self.tags = torch.empty(self.layers, self.heads, 0, dtype=torch.uint8, device=device)
        self.sides: list[Side] = []

    def __len__(self) -> int:
        return self.tags.shape[2]

    @property
    def stop(self) -> int:
        """Position after the last packed token."""
        return self.start + len(self)

    @property
    def blocks(self) -> int:
        return -(-len(self) // BLOCK_TOKENS)

    def block_range(self, block: int) -> tuple[int, int]:
        """First token of a block and the one after its last, counted from `start`."""
        return block * BLOCK_TOKENS, min(len(self), (block + 1) * BLOCK_TOKENS)

    @property
    def nbytes(self) -> int:
        """Allocated bytes of every buffer."""
        total = self.tags.untyped_storage().nbytes()
        for side in self.sides:
            total += side.meta.untyped_storage().nbytes() + sum(pool.nbytes for pool in side.pools)
            total += side.outliers.nbytes if side.outliers else 0
        return total

    def widths(self, side: int) -> torch.Tensor:
        """uint8 [layers, kv_heads, tokens]: bits each vector holds."""
        return _WIDTH.to(self.device)[((self.tags >> (4 * side)) & 15).long()]

    def histogram(self, side: int) -> dict[int, int]:
        """Vectors per width."""
        counts = torch.bincount(((self.tags >> (4 * side)) & 15).reshape(-1), minlength=len(WIDTHS)).tolist()
        return {width: count for width, count in zip(WIDTHS, counts, strict=True) if count}

    def append(
        self,
        widths: tuple[torch.Tensor, torch.Tensor],
        rows: tuple[torch.Tensor, torch.Tensor],
        metas: tuple[torch.Tensor, torch.Tensor],
        outliers: tuple[Outliers | None, Outliers | None],
    ) -> None:
        """Quantizes and packs the next tokens.

        Args:
            widths: keys' and values' uint8 [layers, kv_heads, n].
            rows: keys' and values' float32 [layers, kv_heads, n, head_dim], see `Quantizer.rows`.
            metas: what the codec measured of them.
        """
        held, added = len(self), rows[0].shape[2]
        if not self.sides:
            self.sides = [
                Side(meta[:, :, :0], kept and kept.narrow(0, 0), [])
                for meta, kept in zip(metas, outliers, strict=True)
            ]
        for side in (KEY, VALUE):
            mine = self.sides[side]
            old = self.widths(side)
            for block in range(held // BLOCK_TOKENS, -(-(held + added) // BLOCK_TOKENS)):
                first = max(held, block * BLOCK_TOKENS)
                last = min(held + added, (block + 1) * BLOCK_TOKENS)
                part = slice(first - held, last - held)
                if block == len(mine.pools):
                    mine.pools.append(Pool())
                new = widths[side][:, :, part]
                encoded = self._encode(rows[side][:, :, part], metas[side][:, :, part], new)
                mine.pools[block].append(old[:, :, block * BLOCK_TOKENS : first], new, encoded)
            mine.meta = torch.cat([mine.meta, metas[side]], 2)
            if mine.outliers is not None:
                mine.outliers = mine.outliers.cat(outliers[side])
        self.tags = torch.cat([self.tags, _tags(widths[KEY], widths[VALUE])], 2)

    def _encode(self, rows: torch.Tensor, meta: torch.Tensor, widths: torch.Tensor) -> Rows:
        full_meta = meta.expand(*rows.shape[:3], meta.shape[-1])
        encoded = {}
        for width in WIDTHS[1:]:
            here = widths == width
            if bool(here.any()):
                encoded[width] = self.quantizer.encode(rows[here], full_meta[here], 0, width)
        return encoded

    def change(
        self, side: int, index: torch.Tensor, widths: torch.Tensor, planes: torch.Tensor, offsets: torch.Tensor
    ) -> None:
        """Moves rows to other widths.

        Args:
            index: int64 [n], ascending, flat in [layers, kv_heads, tokens].
            widths: uint8 [n].
            planes: uint8 bytes of what widened rows lack, as in `RowReply`.
            offsets: int64 [n], where a row's bytes begin; not looked at for narrowed rows.
        """
        tokens = len(self)
        old = self.widths(side)
        token = index % tokens
        for block in (token // BLOCK_TOKENS).unique().tolist():
            first, last = self.block_range(block)
            mine = torch.nonzero((token >= first) & (token < last)).squeeze(1)
            local = (index[mine] // tokens) * (last - first) + token[mine] - first
            held = old[:, :, first:last].contiguous()
            rows = self._moved(side, block, held, local, widths[mine], planes, offsets[mine])
            self.sides[side].pools[block].change(held, local, widths[mine], rows)
        shift = 4 * side
        flat = self.tags.view(-1)
        flat[index] = (flat[index] & (0xF0 >> shift)) | (_INDEX.to(self.device)[widths.long()] << shift)

    def _moved(
        self,
        side: int,
        block: int,
        held: torch.Tensor,
        index: torch.Tensor,
        widths: torch.Tensor,
        planes: torch.Tensor,
        offsets: torch.Tensor,
    ) -> Rows:
        """Rows at their new widths, per new width in index order."""
        octets = self.head_dim // 8
        old = held.reshape(-1)[index]
        rows: Rows = {
            width: self.tags.new_empty(int((widths == width).sum()), octets, width)
            for width in widths.unique().tolist()
            if width
        }
        pool = self.sides[side].pools[block]
        for have, want in torch.stack([old, widths], 1).unique(dim=0).tolist():
            if want == 0:
                continue
            pick = (old == have) & (widths == want)
            source = (
                pool.take(held, index[pick], have) if have else self.tags.new_empty(int(pick.sum()), octets, 0)
            )
            if want > have:
                size = octets * (want if want == HALF else want - have)
                reach = offsets[pick][:, None] + torch.arange(size, device=self.device)
                fetched = planes[reach].view(len(reach), octets, -1)
                source = fetched if want == HALF else torch.cat([source, fetched], -1)
            elif have == HALF:
                source = pack(self.quantizer.codec.codes(unpack_half(source)), 0, want)
            rows[want][pick[widths == want]] = source[..., :want]
        return rows

    def affine(self, side: int, layer: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and offset [kv_heads or 1, last-first] of a layer's rows."""
        meta = self.sides[side].meta
        return self.quantizer.codec.affine(meta[min(layer, meta.shape[0] - 1), :, first:last])


def _tags(key_widths: torch.Tensor, value_widths: torch.Tensor) -> torch.Tensor:
    index = _INDEX.to(key_widths.device)
    return index[key_widths.long()] | (index[value_widths.long()] << 4)
