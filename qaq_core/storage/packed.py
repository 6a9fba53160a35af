"""Packed tokens: what one sequence holds of the tokens that have left its residual window.

In position order: one tag byte per (layer, KV head, token) that names the widths of the key and of the value, the
codec's meta bytes, and the outliers of codecs that keep some. The rows are in pools, a key pool and a value pool
per block of tokens. The widths of a key and of its value are independent.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch

from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.quantization.bit_planes import retagged, tags_of, unpack_half, width_index, widths_of
from qaq_core.quantization.outliers import Outliers
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.storage.pool import Pool
from qaq_core.storage.repack import Moves, Repacker, TorchRepacker
from qaq_core.storage.tiled_pool import TiledPool, Weaver

BLOCK_TOKENS = 2048


@dataclass
class Side:
    """What the keys, or the values, have: meta bytes [layers or 1, kv_heads or 1, tokens, m], outliers, pools."""

    meta: torch.Tensor
    outliers: Outliers | None
    pools: list[Pool | TiledPool]


class PackedTokens:
    """The packed tokens of one sequence.

    Args:
        shape: (layers, kv_heads, head_dim).
        start: position of the first token that will be packed.
        repacker: moves the rows of a pool to their places; in torch if not given. With a `Weaver` pools are in tiles.

    Attributes:
        tags: uint8 [layers, kv_heads, tokens], see `bit_planes`.
        version: number of changes to the rows so far.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        shape: tuple[int, int, int],
        start: int,
        device: torch.device,
        repacker: Repacker | Weaver | None = None,
    ) -> None:
        self._repacker = repacker or TorchRepacker()
        self.quantizer, self.start, self.device = quantizer, start, device
        self.layers, self.heads, self.head_dim = shape
        self.tags = torch.empty(self.layers, self.heads, 0, dtype=torch.uint8, device=device)
        self.sides: list[Side] = []
        self.version = 0
        self._runs: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.tags.shape[2]

    @property
    def stop(self) -> int:
        """Position after the last packed token."""
        return self.start + len(self)

    @property
    def blocks(self) -> int:
        return -(-len(self) // BLOCK_TOKENS)

    @property
    def tiled(self) -> bool:
        """Whether rows are in tiles."""
        return isinstance(self._repacker, Weaver)

    @property
    def runs(self) -> torch.Tensor:
        """int64 [layers, kv_heads, blocks, 2, 16], addresses of the runs of rows in tiles, for keys and values.

        Blocks are those of the weaver. There must be tokens. It stays where it is until rows change.
        """
        if self._runs is None or self._runs[0] != self.version:
            parts = [[pool.addresses for pool in side.pools if isinstance(pool, TiledPool)] for side in self.sides]
            self._runs = self.version, torch.stack([torch.cat(addresses, 2) for addresses in parts], 3)
        return self._runs[1]

    def block_range(self, block: int) -> tuple[int, int]:
        """First token of a block and the token after its last, counted from `start`."""
        return block * BLOCK_TOKENS, min(len(self), (block + 1) * BLOCK_TOKENS)

    @property
    def nbytes(self) -> int:
        """Allocated bytes of every buffer."""
        total = self.tags.untyped_storage().nbytes()
        for side in self.sides:
            total += side.meta.untyped_storage().nbytes() + sum(pool.nbytes for pool in side.pools)
            total += side.outliers.nbytes if side.outliers else 0
        total += self._runs[1].nbytes if self._runs is not None else 0
        return total + self.quantizer.own_bytes

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not depend on the widths: tags, meta bytes, outliers, the sequence's means and rotation."""
        parts = [part for side in self.sides for part in (side.meta, side.outliers)]
        return self.tags.numel() + self.quantizer.own_bytes + sum(part.nbytes for part in parts if part is not None)

    @property
    def mean_bits(self) -> float:
        """Code bits per element; there must be tokens."""
        return sum(float(self.widths(side).float().mean()) for side in (KEY, VALUE)) / 4

    @property
    def metas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Meta bytes of all keys and values, see `Side`; there must be tokens."""
        return self.sides[KEY].meta, self.sides[VALUE].meta

    def address(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(layer, head, position) of rows, int64 [n] each.

        Args:
            index: int64 [n], flat in [layers, kv_heads, tokens]. It changes when tokens are appended; an address
                does not.
        """
        layer, head, token = torch.unravel_index(index, self.tags.shape)
        return layer, head, token + self.start

    def flat_index(self, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The index, int64 [n], that `address` translates to these."""
        return (layer.long() * self.heads + head) * len(self) + position - self.start

    def meta_at(self, side: int, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Meta bytes uint8 [n, m] of rows."""
        meta = self.sides[side].meta
        return meta.expand(*self.tags.shape, meta.shape[-1])[layer, head, position - self.start]

    def copy(self) -> PackedTokens:
        """A copy that shares no memory with this."""
        other = copy.copy(self)
        other.tags, other._runs = self.tags.clone(), None
        other.sides = [
            replace(
                side,
                meta=side.meta.clone(),
                outliers=side.outliers and side.outliers.narrow(0, len(self)),
                pools=[pool.copy() for pool in side.pools],
            )
            for side in self.sides
        ]
        return other

    def widths(self, side: int) -> torch.Tensor:
        """uint8 [layers, kv_heads, tokens]: the width of each vector."""
        return widths_of(self.tags, side)

    def histogram(self, side: int) -> dict[float, int]:
        """Bits per element -> number of vectors."""
        counts = torch.bincount(width_index(self.tags, side).reshape(-1), minlength=len(WIDTHS)).tolist()
        return {width / 2: count for width, count in zip(WIDTHS, counts, strict=False) if count}

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
            metas: their meta bytes, see `Quantizer.meta`.
            outliers: those that the codec keeps beside the rows, or None.
        """
        held, added = len(self), rows[0].shape[2]
        if not self.sides:
            self.sides = [
                Side(meta[:, :, :0], kept and kept.narrow(0, 0), []) for meta, kept in zip(metas, outliers, strict=True)
            ]
        tags = torch.cat([self.tags, tags_of(widths[KEY], widths[VALUE])], 2)
        for side in (KEY, VALUE):
            mine = self.sides[side]
            for block in range(held // BLOCK_TOKENS, -(-(held + added) // BLOCK_TOKENS)):
                begin = block * BLOCK_TOKENS
                first, last = max(held, begin), min(held + added, begin + BLOCK_TOKENS)
                if block == len(mine.pools):
                    mine.pools.append(self._new_pool())
                part = slice(first - held, last - held)
                encoded = self._encode(
                    side, rows[side][:, :, part], metas[side][:, :, part], widths[side][:, :, part], first - begin
                )
                mine.pools[block].repack(self.tags[:, :, begin:first], tags[:, :, begin:last], side, encoded)
            mine.meta = torch.cat([mine.meta, metas[side]], 2)
            if mine.outliers is not None:
                mine.outliers = mine.outliers.cat(outliers[side])
        self.tags = tags
        self.version += 1

    def _new_pool(self) -> Pool | TiledPool:
        if not isinstance(self._repacker, Weaver):
            return Pool(self._repacker, self.head_dim // 16)
        if BLOCK_TOKENS % self._repacker.block:
            raise ConfigError(f"pools of {BLOCK_TOKENS} tokens cannot be tiled in blocks of {self._repacker.block}")
        return TiledPool(self._repacker, self.head_dim // 16)

    def _encode(self, side: int, rows: torch.Tensor, meta: torch.Tensor, widths: torch.Tensor, first: int) -> Moves:
        """Quantizes rows [layers, kv_heads, n, head_dim] to their widths; they follow `first` tokens of a block."""
        full_meta = meta.expand(*rows.shape[:3], meta.shape[-1])
        want = widths.reshape(-1)
        nothing = torch.zeros_like(want)
        planes, offsets = self.quantizer.encode_each(side, rows, full_meta.reshape(len(want), -1), nothing, want)
        runs, count = widths.shape[0] * widths.shape[1], widths.shape[2]
        place = torch.arange(first, first + count, device=self.device)
        index = torch.arange(runs, device=self.device)[:, None] * (first + count) + place
        return Moves(index.view(-1), nothing, want, nothing, planes, offsets)

    def change(
        self,
        side: int,
        index: torch.Tensor,
        widths: torch.Tensor,
        planes: torch.Tensor,
        offsets: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> None:
        """Changes rows to other widths.

        Args:
            index: int64 [n], ascending, flat in [layers, kv_heads, tokens].
            widths: uint8 [n], the new widths.
            planes: uint8, the bytes that rows lack, as in `RowReply`.
            offsets: int64 [n], where the bytes of each row begin in `planes`; unused for a row that lacks none.
            keep: uint8 [n], the width up to which a row keeps its bytes; the smaller of both widths if not given.
                All bytes of a row with keep 0 are in `planes`.
        """
        tokens = len(self)
        old = self.tags.view(-1)[index]
        have = widths_of(old, side)
        if keep is None:
            keep = torch.where(widths == HALF, 0, torch.minimum(have, widths))
        after = self.tags.clone()
        after.view(-1)[index] = retagged(old, side, widths)
        token = index % tokens
        for block in range(self.blocks):
            first, last = self.block_range(block)
            here = torch.nonzero((token >= first) & (token < last)).squeeze(1)
            if not len(here):
                continue
            local = (index[here] // tokens) * (last - first) + token[here] - first
            moves = Moves(local, have[here], widths[here], keep[here], planes, offsets[here])
            before, pool = self.tags[:, :, first:last], self.sides[side].pools[block]
            pool.repack(before, after[:, :, first:last], side, self._from_halves(pool, before, side, moves))
        self.tags = after
        self.version += 1

    def narrow(self, widths: tuple[torch.Tensor, torch.Tensor]) -> int:
        """Narrows the rows that are wider than `widths`, uint8 [layers, kv_heads, tokens] of keys and of values.

        Returns:
            number of rows narrowed.
        """
        held = [self.widths(side) for side in (KEY, VALUE)]
        left = [torch.minimum(had, most) for had, most in zip(held, widths, strict=True)]
        falling = [had != has for had, has in zip(held, left, strict=True)]
        after = tags_of(*left)
        for side, mine in enumerate(self.sides):
            if any(pool.holds(HALF) for pool in mine.pools):  # bit planes are not a prefix of half precision
                index = torch.nonzero(falling[side].view(-1)).squeeze(1)
                nothing = torch.empty(0, dtype=torch.uint8, device=self.device)
                self.change(side, index, left[side].view(-1)[index], nothing, torch.zeros_like(index))
                continue
            for block, pool in enumerate(mine.pools):
                first, last = self.block_range(block)
                pool.narrow(self.tags[:, :, first:last], after[:, :, first:last], side)
        self.tags = after
        self.version += 1
        return sum(int(mine.count_nonzero()) for mine in falling)

    def crop(self, tokens: int) -> None:
        """Drops all but the first `tokens` tokens; their memory is freed."""
        if tokens >= len(self):
            return
        for index, side in enumerate(self.sides):
            del side.pools[-(-tokens // BLOCK_TOKENS) :]
            if tokens % BLOCK_TOKENS:
                first, last = self.block_range(len(side.pools) - 1)
                side.pools[-1].crop(self.tags[:, :, first:last], tokens - first, index)
            side.meta = side.meta[:, :, :tokens].clone()
            side.outliers = side.outliers and side.outliers.narrow(0, tokens)
        self.tags = self.tags[:, :, :tokens].clone()
        self.version += 1

    def _from_halves(self, pool: Pool | TiledPool, tags: torch.Tensor, side: int, moves: Moves) -> Moves:
        """The same moves, with all bytes of the rows that become codes from half precision, which has no bit planes."""
        halves = torch.nonzero((moves.have == HALF) & (moves.keep > 0)).squeeze(1)
        if not len(halves):
            return moves
        units = unpack_half(pool.take(tags, side, moves.index[halves], HALF))
        codes, layout = self.quantizer.codec.codes(units), self.quantizer.layout(side, self.head_dim)
        keep, offsets, parts = moves.keep.clone(), moves.offsets.clone(), [moves.planes]
        keep[halves] = 0
        size = len(moves.planes)
        for width in moves.want[halves].unique().tolist():
            mine = moves.want[halves] == width
            made = layout.pack(codes[mine], 0, layout.row_bytes(width)).view(-1)
            offsets[halves[mine]] = torch.arange(size, size + len(made), layout.row_bytes(width), device=self.device)
            parts.append(made)
            size += len(made)
        return replace(moves, keep=keep, planes=torch.cat(parts), offsets=offsets)

    def affine(self, side: int, layer: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales [kv_heads or 1, last-first, 1 or 2] and offset [kv_heads or 1, last-first] of a layer's rows."""
        meta = self.sides[side].meta
        return self.quantizer.codec.affine(meta[min(layer, meta.shape[0] - 1), :, first:last])
