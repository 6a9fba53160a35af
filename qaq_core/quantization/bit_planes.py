"""Bit planes: how codes become bytes, and bytes become levels.

The head_dim codes of a row are cut into octets of 8 dims. A unit is one bit plane of one octet, one byte: dim j
of the octet is bit j of it. Octets differ in how much they matter, so a row is a sequence of units in an order
that is the same for all rows of a side, and a width is how much of the sequence is held: a narrower row is a
prefix of a wider one. Widths are counted in half bits an element; a row of width w takes w · head_dim/16 bytes.
Width HALF is not a code but the row's own half-precision numbers.
"""

from __future__ import annotations

import torch

from qaq_core.base.constants import constant_on
from qaq_core.base.widths import HALF, WIDTHS

_WIDTH = torch.tensor(WIDTHS, dtype=torch.uint8)
_INDEX = torch.zeros(HALF + 1, dtype=torch.uint8)
_INDEX[list(WIDTHS)] = torch.arange(len(WIDTHS), dtype=torch.uint8)


def tags_of(key_widths: torch.Tensor, value_widths: torch.Tensor) -> torch.Tensor:
    """One byte per token: the index into WIDTHS of the key's width in the low four bits, of the value's above."""
    return _lookup(_INDEX, key_widths) | (_lookup(_INDEX, value_widths) << 4)


def retagged(tags: torch.Tensor, side: int, widths: torch.Tensor) -> torch.Tensor:
    """Tags with another width on one side; all uint8 [n]."""
    return (tags & (0xF0 >> (4 * side))) | (_lookup(_INDEX, widths) << (4 * side))


def width_index(tags: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 indices into WIDTHS of one side."""
    return (tags >> (4 * side)) & 15


def widths_of(tags: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 widths of one side."""
    return _lookup(_WIDTH, width_index(tags, side))


def _lookup(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return constant_on(table, index.device).index_select(0, index.reshape(-1).int()).view(index.shape)


def round_robin(head_dim: int) -> torch.Tensor:
    """The order of units that treats all octets alike: uint8 [head_dim]."""
    return torch.arange(head_dim // 8, dtype=torch.uint8).repeat(8)


class RowLayout:
    """Which plane of which octet each byte of a row holds.

    Args:
        order: uint8 [head_dim], the octet of each unit; the k-th unit of an octet is its plane k, 0 the most
            significant.
    """

    def __init__(self, order: torch.Tensor) -> None:
        self.order = order.cpu()
        self.octets = len(order) // 8
        seen = torch.nn.functional.one_hot(self.order.long(), self.octets).cumsum(0)
        plane = seen.gather(1, self.order.long()[:, None]).squeeze(1) - 1
        self.units = self.order.long() * 8 + plane
        """int64 [head_dim]: 8 · octet + plane of each unit."""
        self.planes = torch.stack([self._held(width) for width in range(HALF // 2 + 1)])
        """uint8 [17, octets]: planes of each octet at each width up to 8 bits."""

    def _held(self, width: int) -> torch.Tensor:
        return torch.bincount(self.order[: self.row_bytes(width)].int(), minlength=self.octets).to(torch.uint8)

    def row_bytes(self, width: int) -> int:
        return width * self.octets // 2

    def pack(self, codes: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Bytes first..last-1 of rows.

        Args:
            codes: uint8 [n, head_dim].
        Returns:
            uint8 [n, last-first].
        """
        planes = _transpose(codes.contiguous().view(torch.int64)).view(torch.uint8)  # byte i: bit i of 8 codes
        place = constant_on(self.units, codes.device)[first:last]
        return planes.index_select(1, place ^ 7)

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [n, head_dim] of rows uint8 [n, bytes]; bits that are not held are 0."""
        planes = torch.zeros(len(rows), 8 * self.octets, dtype=torch.uint8, device=rows.device)
        planes[:, constant_on(self.units, rows.device)[: rows.shape[1]] ^ 7] = rows
        return _transpose(planes.view(torch.int64)).view(torch.uint8)


class LevelTable:
    """Turns packed rows into levels.

    Args:
        levels: of 1 to 8 bits, float [2^b] each.
    """

    def __init__(self, levels: list[torch.Tensor], layout: RowLayout, device: torch.device) -> None:
        self._layout = layout
        table = torch.zeros(9, 256)
        for bits, some in enumerate(levels, 1):
            table[bits] = some.repeat_interleave(256 >> bits)
        self._table = table.view(-1).to(device)
        self._part = (layout.planes.int() * 256).repeat_interleave(8, 1).to(device)

    def unpack(self, rows: torch.Tensor, width: int, out: torch.Tensor) -> None:
        """Writes levels float [n, head_dim] of rows uint8 [n, bytes] of one width."""
        index = self._layout.unpack(rows).int() + self._part[width]
        torch.index_select(self._table, 0, index.view(-1), out=out.view(-1))


def _transpose(bits: torch.Tensor) -> torch.Tensor:
    """Each int64 as a matrix of 8 bytes of 8 bits, transposed (Warren, Hacker's Delight, 7-3)."""
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        swap = (bits ^ (bits >> shift)) & mask
        bits = bits ^ swap ^ (swap << shift)
    return bits


def pack_half(rows: torch.Tensor) -> torch.Tensor:
    """Half-precision rows [n, head_dim] as uint8 [n, 2·head_dim]."""
    return rows.to(torch.float16).contiguous().view(torch.uint8)


def unpack_half(rows: torch.Tensor) -> torch.Tensor:
    """float32 [n, head_dim] of half-precision rows uint8 [n, 2·head_dim]."""
    return rows.contiguous().view(torch.float16).float()
