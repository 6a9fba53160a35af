"""Repacking: the rows of a pool are put in order again when rows are added or change their width.

The torch implementation here runs on any device and defines the result; on a CPU kernels/repack.py computes the same
in one pass, at memcpy speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from qaq_core.base.widths import WIDTHS
from qaq_core.quantization.bit_planes import width_index, widths_of

Rows = dict[int, torch.Tensor]
"""width -> uint8 [n, width · head_dim/16], ordered by (layer, head, token); width 0 has none."""


@dataclass(frozen=True)
class Moves:
    """n rows that are added at the end of their head, or change their width.

    Attributes:
        index: int64 [n], ascending, flat in the tags [layers, kv_heads, tokens] after the move.
        have, want: uint8 [n], width before (0 for added rows) and after.
        keep: uint8 [n], width up to which the old row is kept.
        planes: uint8, the remaining bytes of the rows.
        offsets: int64 [n], offset of each row in `planes`.
    """

    index: torch.Tensor
    have: torch.Tensor
    want: torch.Tensor
    keep: torch.Tensor
    planes: torch.Tensor
    offsets: torch.Tensor


class Repacker(Protocol):
    def count(self, tags: torch.Tensor, side: int) -> torch.Tensor:
        """Rows of each of WIDTHS: int64 [layers, kv_heads, widths], of tags [layers, kv_heads, tokens]."""
        ...

    def repack(
        self, held: Rows, half_bit: int, before: torch.Tensor, after: torch.Tensor, side: int, moves: Moves
    ) -> Rows:
        """Rows after the moves; the tensors of widths that no move touches are returned as they are.

        Args:
            half_bit: bytes of half a bit per element, head_dim/16.
            before, after: tags [layers, kv_heads, tokens]; `after` may have more tokens, which are added.
        """
        ...

    def narrow(self, held: Rows, half_bit: int, before: torch.Tensor, after: torch.Tensor, side: int) -> Rows:
        """Rows truncated to the widths of `after`, at most those of `before`. No row is in half precision."""
        ...


class TorchRepacker:
    def count(self, tags: torch.Tensor, side: int) -> torch.Tensor:
        layers, heads, _ = tags.shape
        first = torch.arange(layers * heads, device=tags.device).view(layers, heads, 1) * len(WIDTHS)
        place = width_index(tags, side) + first
        counts = torch.bincount(place.reshape(-1), minlength=layers * heads * len(WIDTHS))
        return counts.view(layers, heads, -1).cpu()

    def repack(
        self, held: Rows, half_bit: int, before: torch.Tensor, after: torch.Tensor, side: int, moves: Moves
    ) -> Rows:
        old, new = widths_of(before, side), widths_of(after, side)
        moved = torch.zeros(new.shape, dtype=torch.bool, device=new.device)
        moved.view(-1)[moves.index] = True
        stays = ~moved[:, :, : old.shape[2]]
        run, token = moves.index // new.shape[2], moves.index % new.shape[2]
        source = run * old.shape[2] + token
        touched = {*moves.have.unique().tolist(), *moves.want.unique().tolist()}
        rows: Rows = {}
        for width in WIDTHS[1:]:
            if width not in touched:
                if width in held:
                    rows[width] = held[width]
                continue
            here = new == width
            repacked = torch.empty(int(here.sum()), width * half_bit, dtype=torch.uint8, device=new.device)
            if not len(repacked):
                continue
            coming = moved[here]
            if width in held:
                repacked[~coming] = held[width][stays[old == width]]
            mine = torch.nonzero(moves.want == width).squeeze(1)
            repacked[coming] = _moved(held, half_bit, old, source, moves, mine, width)
            rows[width] = repacked
        return rows

    def narrow(self, held: Rows, half_bit: int, before: torch.Tensor, after: torch.Tensor, side: int) -> Rows:
        have, want = widths_of(before, side).reshape(-1), widths_of(after, side).reshape(-1)
        index = torch.nonzero(have != want).squeeze(1)
        keep, nothing = want[index], torch.empty(0, dtype=torch.uint8, device=index.device)
        moves = Moves(index, have[index], keep, keep, nothing, torch.zeros_like(index))
        return self.repack(held, half_bit, before, after, side, moves)


def _moved(
    held: Rows,
    half_bit: int,
    old: torch.Tensor,
    source: torch.Tensor,
    moves: Moves,
    mine: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """The rows of the moves `mine`, which all have that width afterwards, in order."""
    rows = torch.empty(len(mine), width * half_bit, dtype=torch.uint8, device=old.device)
    kinds = torch.stack([moves.have[mine], moves.keep[mine]], 1)
    for have, keep in kinds.unique(dim=0).tolist():
        where = torch.nonzero((kinds[:, 0] == have) & (kinds[:, 1] == keep)).squeeze(1)
        pick = mine[where]
        if keep:
            rank = (old.reshape(-1) == have).cumsum(0) - 1
            rows[where, : keep * half_bit] = held[have][rank[source[pick]], : keep * half_bit]
        if width > keep:
            reach = moves.offsets[pick][:, None] + torch.arange(half_bit * (width - keep), device=old.device)
            rows[where, keep * half_bit :] = moves.planes[reach]
    return rows
