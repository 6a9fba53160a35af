"""A pool whose rows live in tiles, as kernels of a GPU read them. There is no other copy.

A run has the rows of one width of a layer, a KV head and a block of tokens, in the order of tokens. Byte (unit u, row
t) of a tile of m rows is at u·m + t. Tiles have 32 rows; the last one of a run is filled up to a multiple of 4. Rows in
half precision stand one after the other. As in a `Pool`, the tags are the only index.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qaq_core.base.constants import constant_on
from qaq_core.base.widths import WIDTHS
from qaq_core.quantization.bit_planes import width_index
from qaq_core.storage.pool import ranks
from qaq_core.storage.repack import Moves, Rows

FILL = 4
"""Rows of a run's last tile are filled up to a multiple of this."""
NIBBLE = 16
"""Widths that a tag can name."""
_HALF_BITS = torch.zeros(NIBBLE, dtype=torch.int64)
_HALF_BITS[: len(WIDTHS)] = torch.tensor(WIDTHS)


@dataclass
class Tiles:
    """Rows.

    Attributes:
        data: uint8, all bytes.
        runs: int64 [layers, kv_heads, blocks, NIBBLE], where runs begin in `data`.
        counts: on the host, how many rows each width has.
    """

    data: torch.Tensor
    runs: torch.Tensor
    counts: list[int]


class Weaver(ABC):
    """Writes rows to new places.

    Attributes:
        block: tokens of a block. It divides those of a pool.
    """

    block: int

    @abstractmethod
    def weave(
        self,
        held: Tiles,
        before: torch.Tensor,
        after: torch.Tensor,
        side: int,
        unit: int,
        moves: Moves | None = None,
        tiled: bool = True,
    ) -> Tiles:
        """Rows by tags [layers, kv_heads, tokens] before and after; those that are not moved keep what fits.

        Args:
            unit: bytes of half a bit, head_dim/16.
            tiled: the new rows are in tiles, or by width, one after the other: (width, layer, head, token).
        """


def place_runs(tags: torch.Tensor, side: int, unit: int, block: int, tiled: bool) -> Tiles:
    """Room for the rows of tags, and where runs begin in it. The host waits for the counts."""
    layers, heads, tokens = tags.shape
    blocks = -(-tokens // block)
    index = torch.nn.functional.pad(width_index(tags, side), (0, blocks * block - tokens), value=NIBBLE - 1)
    index = index.view(-1, block).long()
    counts = torch.zeros(len(index), NIBBLE, dtype=torch.int64, device=tags.device)
    counts.scatter_add_(1, index, torch.ones((), dtype=torch.int64, device=tags.device).expand(index.shape))
    rows = (counts + FILL - 1) // FILL * FILL if tiled else counts
    sizes = rows * (constant_on(_HALF_BITS, tags.device) * unit)
    flat = (sizes if tiled else sizes.T).reshape(-1)
    places = flat.cumsum(0) - flat
    runs = places.view(sizes.shape) if tiled else places.view(NIBBLE, -1).T.contiguous()
    counted, total = torch.cat([counts.sum(0), sizes.sum().view(1)]).split([NIBBLE, 1])
    known = torch.cat([counted, total]).tolist()
    data = torch.empty(known.pop(), dtype=torch.uint8, device=tags.device)
    return Tiles(data, runs.view(layers, heads, blocks, NIBBLE), known)


class TiledPool:
    """Packed rows of a block of tokens on one side; see `Pool`, which does the same with other places.

    Args:
        half_bit: bytes of half a bit, head_dim/16.
    """

    def __init__(self, weaver: Weaver, half_bit: int) -> None:
        self._weaver, self._half_bit = weaver, half_bit
        self._tiles: Tiles | None = None

    @property
    def nbytes(self) -> int:
        held = self._tiles
        return 0 if held is None else held.data.untyped_storage().nbytes() + held.runs.untyped_storage().nbytes()

    @property
    def addresses(self) -> torch.Tensor:
        """int64 [layers, kv_heads, blocks, NIBBLE], where runs begin."""
        assert self._tiles is not None
        return self._tiles.runs + self._tiles.data.data_ptr()

    def copy(self) -> TiledPool:
        """A copy."""
        other = copy.copy(self)
        if self._tiles is not None:
            other._tiles = Tiles(self._tiles.data.clone(), self._tiles.runs.clone(), self._tiles.counts)
        return other

    def holds(self, width: int) -> bool:
        """Whether there are rows of a width."""
        return self._tiles is not None and self._tiles.counts[WIDTHS.index(width)] > 0

    def repack(self, before: torch.Tensor, after: torch.Tensor, side: int, moves: Moves) -> None:
        """See `Pool.repack`."""
        self._weave(before, after, side, moves)

    def narrow(self, before: torch.Tensor, after: torch.Tensor, side: int) -> None:
        """See `Pool.narrow`."""
        self._weave(before, after, side)

    def crop(self, before: torch.Tensor, tokens: int, side: int) -> None:
        """See `Pool.crop`."""
        self._weave(before, before[:, :, :tokens], side)

    def of_layer(self, tags: torch.Tensor, side: int, layer: int) -> Rows:
        """See `Pool.of_layer`: copies, of all its rows."""
        return self._rows(tags.unsqueeze(0), side, slice(layer, layer + 1))

    def take_at(
        self, tags: torch.Tensor, side: int, layer: int, head: torch.Tensor, token: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """See `Pool.take_at`."""
        rows = self.of_layer(tags, side, layer)
        own, rank = ranks(tags, side, head, token)
        for index in own.unique().tolist():
            if WIDTHS[index]:
                mine = torch.nonzero(own[:, 0] == index).squeeze(1)
                counts = (width_index(tags, side) == index).sum(1)
                first = (counts.cumsum(0) - counts)[head[mine]]
                yield WIDTHS[index], mine, rows[WIDTHS[index]][first + rank[mine]]

    def take(self, tags: torch.Tensor, side: int, index: torch.Tensor, width: int) -> torch.Tensor:
        """See `Pool.take`."""
        rank = (width_index(tags, side).reshape(-1) == WIDTHS.index(width)).cumsum(0) - 1
        return self._rows(tags, side, slice(None))[width][rank[index]]

    def _weave(self, before: torch.Tensor, after: torch.Tensor, side: int, moves: Moves | None = None) -> None:
        held = self._tiles
        if held is None:
            nowhere = torch.zeros(*after.shape[:2], 0, NIBBLE, dtype=torch.int64, device=after.device)
            held = Tiles(torch.empty(0, dtype=torch.uint8, device=after.device), nowhere, [0] * NIBBLE)
        self._tiles = self._weaver.weave(held, before, after, side, self._half_bit, moves)

    def _rows(self, tags: torch.Tensor, side: int, layers: slice) -> Rows:
        """Rows by width, of some layers."""
        assert self._tiles is not None
        held = Tiles(self._tiles.data, self._tiles.runs[layers], [])
        made = self._weaver.weave(held, tags, tags, side, self._half_bit, tiled=False)
        sizes = [count * width * self._half_bit for count, width in zip(made.counts, WIDTHS, strict=False)]
        parts = zip(WIDTHS, made.data.split(sizes), strict=True)
        return {width: part.view(-1, width * self._half_bit) for width, part in parts if len(part)}
