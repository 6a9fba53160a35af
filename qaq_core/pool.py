"""A pool: the packed rows of one side (keys or values) of one block of tokens.

Rows of one width stand together, ordered by (layer, head, token). A row's place is its rank among equal
widths in that order, so positions are not stored: the widths [layers, kv_heads, tokens], kept by the
caller, are the only index. A block that changes is woven again whole, at memcpy speed.
"""

from __future__ import annotations

import torch

from qaq_core.packing import WIDTHS

Rows = dict[int, torch.Tensor]


class Pool:
    """Packed rows of a block.

    Attributes:
        rows: width -> uint8 [n, head_dim/8, width]; width 0 has none.
    """

    def __init__(self) -> None:
        self.rows: Rows = {}
        self._starts: dict[int, list[int]] = {}
        self._addresses: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(rows.untyped_storage().nbytes() for rows in self.rows.values())

    def layer(self, width: int, layer: int) -> torch.Tensor:
        """Rows of that width in one layer, ordered by (head, token)."""
        starts = self._starts[width]
        return self.rows[width][starts[layer] : starts[layer + 1]]

    def addresses(self, layers: int) -> torch.Tensor:
        """Where each layer's rows of each of WIDTHS begin: int64 [layers, widths], 0 where there are none.

        Good until the pool changes.
        """
        if self._addresses is None:
            self._addresses = torch.zeros(layers, len(WIDTHS), dtype=torch.int64)
            for width, rows in self.rows.items():
                starts = torch.tensor(self._starts[width])
                begins = rows.data_ptr() + starts[:-1] * (rows.stride(0) * rows.itemsize)
                self._addresses[:, WIDTHS.index(width)] = begins * (starts.diff() > 0)
        return self._addresses

    def append(self, old_widths: torch.Tensor, new_widths: torch.Tensor, new_rows: Rows) -> None:
        """Adds tokens at the end.

        Args:
            old_widths: uint8 [layers, kv_heads, tokens held].
            new_widths: uint8 [layers, kv_heads, tokens added].
            new_rows: per width, ordered by (layer, head, token).
        """
        widths = torch.cat([old_widths, new_widths], 2)
        fresh = torch.zeros(widths.shape, dtype=torch.bool, device=widths.device)
        fresh[:, :, old_widths.shape[2] :] = True
        self._weave(widths, fresh, self.rows, new_rows)

    def change(self, old_widths: torch.Tensor, index: torch.Tensor, new_widths: torch.Tensor, rows: Rows) -> None:
        """Moves rows to other widths.

        Args:
            old_widths: uint8 [layers, kv_heads, tokens].
            index: int64 [n], ascending, which rows move, flat in old_widths.
            new_widths: uint8 [n].
            rows: per new width, the moved rows of that width in index order.
        """
        flat = old_widths.reshape(-1)
        widths = flat.clone()
        widths[index] = new_widths
        moved = torch.zeros_like(flat, dtype=torch.bool)
        moved[index] = True
        leaving = set(flat[index].unique().tolist())
        kept = {w: held[~moved[flat == w]] if w in leaving else held for w, held in self.rows.items()}
        self._weave(widths.view(old_widths.shape), moved.view(old_widths.shape), kept, rows)

    def take(self, widths: torch.Tensor, index: torch.Tensor, width: int) -> torch.Tensor:
        """Rows at flat indices [n] that all have that width: uint8 [n, head_dim/8, width]."""
        rank = (widths.reshape(-1) == width).cumsum(0) - 1
        return self.rows[width][rank[index]]

    def _weave(self, widths: torch.Tensor, fresh: torch.Tensor, kept: Rows, new: Rows) -> None:
        rows: Rows = {}
        starts: dict[int, list[int]] = {}
        for width in WIDTHS[1:]:
            if width not in kept and width not in new:
                continue
            here = widths == width
            ends = here.sum((1, 2)).cumsum(0).tolist()
            if ends[-1] == 0:
                continue
            starts[width] = [0, *ends]
            rows[width] = _interleave(fresh[here], kept.get(width), new.get(width))
        self.rows, self._starts, self._addresses = rows, starts, None


def _interleave(fresh: torch.Tensor, kept: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor:
    if new is None or len(new) == 0:
        assert kept is not None
        return kept
    if kept is None or len(kept) == 0:
        return new.contiguous() if new.untyped_storage().nbytes() == new.nbytes else new.clone()
    rows = kept.new_empty(len(fresh), *kept.shape[1:])
    rows[fresh] = new
    rows[~fresh] = kept
    return rows
