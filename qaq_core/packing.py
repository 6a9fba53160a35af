"""Bit planes: how codes become bytes, and bytes become levels.

A row of head_dim codes at b bits is stored as uint8 [b, head_dim/8]: byte [p, i] holds bit plane p
(0 the most significant) of dims 8i..8i+7, dim 8i+j in bit j. Codes are nested (the b-bit code is the
first b bits of the 8-bit code), so narrowing a row is leaving out its last planes and widening it is
appending the missing ones. Width 16 is not a code but the row's own half-precision values, in the same
[16, head_dim/8] bytes.
"""

from __future__ import annotations

import torch

HALF = 16
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, HALF)

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
    return table.to(index.device).index_select(0, index.reshape(-1).int()).view(index.shape)


def pack(codes: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Planes first..last-1 of 8-bit codes.

    Args:
        codes: uint8 [n, head_dim].
    Returns:
        uint8 [n, last-first, head_dim/8].
    """
    octets = codes.view(codes.shape[0], codes.shape[1] // 8, 8)
    place = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [(((octets >> (7 - p)) & 1) << place).sum(-1, dtype=torch.uint8) for p in range(first, last)]
    if not planes:
        return octets.new_empty(octets.shape[0], 0, octets.shape[1])
    return torch.stack(planes, 1)


def pack_half(rows: torch.Tensor) -> torch.Tensor:
    """Half-precision rows [n, head_dim] as uint8 [n, 16, head_dim/8]."""
    return rows.to(torch.float16).contiguous().view(torch.uint8).view(rows.shape[0], HALF, rows.shape[1] // 8)


class LevelTable:
    """Turns packed rows of one width into levels, a few dims a lookup.

    Args:
        levels: float [2^b], the level of each b-bit code, 1 <= b <= 8.
    """

    def __init__(self, levels: torch.Tensor) -> None:
        self.bits = levels.numel().bit_length() - 1
        # Index bit p·k + j is plane p of dim j of the k dims. Tables stay small: a model's weights
        # flush the caches between one layer's rows and the next's.
        self.dims = {1: 8, 2: 4, 3: 4}.get(self.bits, 2)
        self._levels = levels[self._codes(levels.device)]
        self._spread = self._spread_planes(levels.device)
        self._plane = (torch.arange(self.bits, device=levels.device) << 8).unsqueeze(-1)

    def _codes(self, device: torch.device) -> torch.Tensor:
        """int64 [2^(k·b), k]: the codes of the dims of every index."""
        index = torch.arange(1 << (self.dims * self.bits), device=device)
        codes = torch.zeros(len(index), self.dims, dtype=torch.long, device=device)
        for j in range(self.dims):
            for p in range(self.bits):
                codes[:, j] |= ((index >> (p * self.dims + j)) & 1) << (self.bits - 1 - p)
        return codes

    def _spread_planes(self, device: torch.device) -> torch.Tensor:
        """int64 [b·256]: what byte v of plane p adds to the 16-bit indices of its 8 dims, side by side."""
        byte = torch.arange(256, device=device)
        planes = []
        for p in range(self.bits):
            spread = torch.zeros_like(byte)
            for part in range(8 // self.dims):
                field = (byte >> (part * self.dims)) & ((1 << self.dims) - 1)
                spread |= field << (16 * part + p * self.dims)
            planes.append(spread)
        return torch.cat(planes)

    def unpack(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Writes levels float [n, head_dim] of rows uint8 [n, b, head_dim/8]."""
        if self.bits == 1:
            index = rows.to(torch.int32)
        else:
            spread = self._spread.take(rows + self._plane)
            fields = spread.sum(1).view(torch.uint16).view(-1, 4)
            index = fields[:, : 8 // self.dims].to(torch.int32)
        torch.index_select(self._levels, 0, index.reshape(-1), out=out.view(-1, self.dims))


def unpack_half(rows: torch.Tensor) -> torch.Tensor:
    """float32 [n, head_dim] of half-precision rows uint8 [n, 16, head_dim/8]."""
    return rows.flatten(1).view(torch.float16).float()
