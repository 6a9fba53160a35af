"""A pool: the packed rows of one side (keys or values) of one block of tokens.

Rows of one width stand together, ordered by (layer, head, token). A row's place is its rank among equal
widths in that order, so positions are not stored: the tags, kept by the caller, are the only index. A block
that changes is repacked, see `repack`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from qaq_core.base.widths import WIDTHS
from qaq_core.quantization.bit_planes import width_index
from qaq_core.storage.repack import Moves, Repacker, Rows


class Pool:
    """Packed rows of a block.

    Attributes:
        rows: width -> uint8 [n, width · head_dim/16]; width 0 has none.
        first: int32 [layers, kv_heads, widths] on the CPU, a head's first row among those of each of WIDTHS.
    """

    def __init__(self, repacker: Repacker, half_bit: int) -> None:
        self.rows: Rows = {}
        self.first = torch.empty(0, dtype=torch.int32)
        self._repacker, self._half_bit = repacker, half_bit
        self._starts: list[list[int]] = []

    @property
    def nbytes(self) -> int:
        return self.first.nbytes + sum(rows.untyped_storage().nbytes() for rows in self.rows.values())

    def copy(self) -> Pool:
        """A copy."""
        other = copy.copy(self)
        other.rows = {width: rows.clone() for width, rows in self.rows.items()}
        other.first = self.first.clone()
        return other

    def holds(self, width: int) -> bool:
        """Whether there are rows of a width."""
        return width in self.rows

    def of_layer(self, tags: torch.Tensor, side: int, layer: int) -> Rows:
        """The rows of a layer by width, ordered by (head, token).

        Args:
            tags: the block's, of that layer: [kv_heads, tokens].
        """
        return {width: self.layer(width, layer) for width in self.rows}

    def layer(self, width: int, layer: int) -> torch.Tensor:
        """Rows of that width in one layer, ordered by (head, token)."""
        starts = self._starts[WIDTHS.index(width)]
        return self.rows[width][starts[layer] : starts[layer + 1]]

    def repack(self, before: torch.Tensor, after: torch.Tensor, side: int, moves: Moves) -> None:
        """Adds rows, or changes their width.

        Args:
            before, after: the block's tags [layers, kv_heads, tokens]; `after` may have more tokens.
        """
        self.rows = self._repacker.repack(self.rows, self._half_bit, before, after, side, moves)
        self._find_rows(after, side)

    def narrow(self, before: torch.Tensor, after: torch.Tensor, side: int) -> None:
        """Truncates rows to the widths of `after`, at most those of `before`. No row is in half precision."""
        self.rows = self._repacker.narrow(self.rows, self._half_bit, before, after, side)
        self._find_rows(after, side)

    def crop(self, before: torch.Tensor, tokens: int, side: int) -> None:
        """Drops the rows of all but the first `tokens` tokens of the block, whose tags were `before`."""
        which = width_index(before, side)
        stays = torch.zeros_like(which, dtype=torch.bool)
        stays[:, :, :tokens] = True
        kept = {width: rows[stays[which == WIDTHS.index(width)]] for width, rows in self.rows.items()}
        self.rows = {width: rows for width, rows in kept.items() if len(rows)}
        self._find_rows(before[:, :, :tokens], side)

    def _find_rows(self, tags: torch.Tensor, side: int) -> None:
        """Finds the first row of each layer and head."""
        counts = self._repacker.count(tags, side)
        self._starts = torch.nn.functional.pad(counts.sum(1).cumsum(0), (0, 0, 1, 0)).T.tolist()
        flat = counts.view(-1, len(WIDTHS))
        self.first = (flat.cumsum(0) - flat).view(counts.shape).int()

    def take_at(
        self, tags: torch.Tensor, side: int, layer: int, head: torch.Tensor, token: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Some rows of a layer: for each width above 0 the width, which of the n they are, and their bytes.

        Args:
            tags: the block's, of that layer: [kv_heads, tokens].
            head, token: int64 [n].
        """
        own, rank = ranks(tags, side, head, token)
        for index in own.unique().tolist():
            if WIDTHS[index]:
                mine = torch.nonzero(own[:, 0] == index).squeeze(1)
                first = self.first[layer, head[mine].cpu(), index].to(tags.device)
                yield WIDTHS[index], mine, self.rows[WIDTHS[index]][first + rank[mine]]

    def take(self, tags: torch.Tensor, side: int, index: torch.Tensor, width: int) -> torch.Tensor:
        """Rows at flat indices [n] that all have that width: uint8 [n, bytes]."""
        rank = (width_index(tags, side).reshape(-1) == WIDTHS.index(width)).cumsum(0) - 1
        return self.rows[width][rank[index]]


def ranks(tags: torch.Tensor, side: int, head: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The width's index uint8 [n, 1] of single rows, and their ranks int64 [n] among those of their head and width.

    Args:
        tags: of a layer, [kv_heads, tokens]. head, token: int64 [n].
    """
    which = width_index(tags, side)[head]  # [n, tokens]
    own = which.gather(1, token.unsqueeze(1))
    before = torch.arange(tags.shape[1], device=tags.device) < token.unsqueeze(1)
    return own, ((which == own) & before).sum(1)
