"""A pool: the packed rows of one side (keys or values) of one block of tokens.

Rows of one width stand together, ordered by (layer, head, token). A row's place is its rank among equal
widths in that order, so positions are not stored: the tags, kept by the caller, are the only index. A block
that changes is woven again, see `weaving`.
"""

from __future__ import annotations

import torch

from qaq_core.packing import WIDTHS, width_index
from qaq_core.weaving import Moves, Rows, Weaver


class Pool:
    """Packed rows of a block.

    Attributes:
        rows: width -> uint8 [n, width · head_dim/16]; width 0 has none.
    """

    def __init__(self, weaver: Weaver, half_bit: int) -> None:
        self.rows: Rows = {}
        self._weaver, self._half_bit = weaver, half_bit
        self._starts: list[list[int]] = []
        self._addresses: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(rows.untyped_storage().nbytes() for rows in self.rows.values())

    def layer(self, width: int, layer: int) -> torch.Tensor:
        """Rows of that width in one layer, ordered by (head, token)."""
        starts = self._starts[WIDTHS.index(width)]
        return self.rows[width][starts[layer] : starts[layer + 1]]

    def addresses(self) -> torch.Tensor:
        """Where each layer's rows of each of WIDTHS begin: int64 [layers, widths], 0 where there are none.

        Good until the pool changes.
        """
        if self._addresses is None:
            starts = torch.tensor(self._starts).T
            self._addresses = torch.zeros(len(starts) - 1, len(WIDTHS), dtype=torch.int64)
            for width, rows in self.rows.items():
                mine = starts[:, WIDTHS.index(width)]
                begins = rows.data_ptr() + mine[:-1] * (rows.stride(0) * rows.itemsize)
                self._addresses[:, WIDTHS.index(width)] = begins * (mine.diff() > 0)
        return self._addresses

    def weave(self, before: torch.Tensor, after: torch.Tensor, side: int, moves: Moves) -> None:
        """Takes in rows that come or change their width.

        Args:
            before, after: the block's tags [layers, kv_heads, tokens]; `after` may have more tokens.
        """
        self.rows = self._weaver.weave(self.rows, self._half_bit, before, after, side, moves)
        counts = self._weaver.count(after, side)
        self._starts = torch.nn.functional.pad(counts.cumsum(0), (0, 0, 1, 0)).T.tolist()
        self._addresses = None

    def take(self, tags: torch.Tensor, side: int, index: torch.Tensor, width: int) -> torch.Tensor:
        """Rows at flat indices [n] that all have that width: uint8 [n, bytes]."""
        rank = (width_index(tags, side).reshape(-1) == WIDTHS.index(width)).cumsum(0) - 1
        return self.rows[width][rank[index]]
