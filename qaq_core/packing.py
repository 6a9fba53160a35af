"""Bit planes: how codes become bytes, and bytes become levels.

A row of head_dim codes at b bits is stored as uint8 [head_dim/8, b]: byte [i, p] holds bit plane p
(0 the most significant) of dims 8i..8i+7, dim 8i+j in bit j. Codes are nested (the b-bit code is the
first b bits of the 8-bit code), so narrowing a row is leaving out its last planes and widening it is
appending the missing ones. Width 16 is not a code but the row's own half-precision values, in the same
[head_dim/8, 16] bytes.
"""

from __future__ import annotations

import torch

HALF = 16
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, HALF)


def pack(codes: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Planes first..last-1 of 8-bit codes.

    Args:
        codes: uint8 [n, head_dim].
    Returns:
        uint8 [n, head_dim/8, last-first].
    """
    octets = codes.view(codes.shape[0], -1, 8)
    place = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [(((octets >> (7 - p)) & 1) << place).sum(-1, dtype=torch.uint8) for p in range(first, last)]
    if not planes:
        return octets.new_empty(octets.shape[0], octets.shape[1], 0)
    return torch.stack(planes, -1)


def pack_half(rows: torch.Tensor) -> torch.Tensor:
    """Half-precision rows [n, head_dim] as uint8 [n, head_dim/8, 16]."""
    return rows.to(torch.float16).contiguous().view(torch.uint8).view(rows.shape[0], -1, HALF)


def dims_per_lookup(bits: int) -> int:
    """How many dims one table lookup turns into levels: the index has at most 16 bits."""
    return 8 if bits <= 2 else 4 if bits <= 4 else 2


def lookup_table(levels: torch.Tensor) -> torch.Tensor:
    """Table that turns the plane bits of a few dims into their levels.

    Args:
        levels: float [2^b], the level of each b-bit code.
    Returns:
        float [2^(k·b), k], k = `dims_per_lookup(b)`; index bit p·k+j is plane p of dim j.
    """
    bits = levels.numel().bit_length() - 1
    k = dims_per_lookup(bits)
    index = torch.arange(1 << (k * bits), device=levels.device)
    code = torch.zeros(index.numel(), k, dtype=torch.long, device=levels.device)
    for j in range(k):
        for p in range(bits):
            code[:, j] |= ((index >> (p * k + j)) & 1) << (bits - 1 - p)
    return levels[code]


def unpack(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Levels of packed rows.

    Args:
        rows: uint8 [n, head_dim/8, b], 1 <= b <= 8.
        table: from `lookup_table`.
    Returns:
        float [n, head_dim].
    """
    n, octets, bits = rows.shape
    k = dims_per_lookup(bits)
    if bits == 1:
        index = rows.to(torch.int32)
    elif bits == 2:
        index = rows.view(torch.int16).to(torch.int32) & 0xFFFF
    else:
        planes = rows.to(torch.int32)
        parts = []
        for shift in range(0, 8, k):
            fields = (planes >> shift) & ((1 << k) - 1)
            part = fields[..., 0]
            for p in range(1, bits):
                part = part | (fields[..., p] << (p * k))
            parts.append(part)
        index = torch.stack(parts, -1)
    return table.index_select(0, index.reshape(-1)).view(n, octets * 8)


def unpack_half(rows: torch.Tensor) -> torch.Tensor:
    """float32 [n, head_dim] of half-precision rows uint8 [n, head_dim/8, 16]."""
    return rows.reshape(rows.shape[0], -1).view(torch.float16).float()
