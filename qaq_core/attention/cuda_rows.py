"""Packed rows as CUDA kernels read them: one layer's, transposed in tiles of 32 rows of one width.

A run has the rows of one width of a KV head, a block and a side, in the order of tokens. Byte (unit u, row t) of a tile
of m rows is at u·m + t. The last tile of a run is filled up to a multiple of 4 rows. Rows in half precision stand one
after the other. The bytes are those of the pools, so this is a second copy of them.
"""

from __future__ import annotations

import torch

from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.kernels.cuda.structures import TILE
from qaq_core.quantization.bit_planes import width_index
from qaq_core.storage.packed import PackedTokens

HEADROOM = 1.25
"""Memory that is allocated, in what is needed: rows that change soon are written to the same addresses."""
FILL = 4


class TiledRows:
    """The rows of one layer of a sequence.

    Args:
        block: tokens of a block.
    Attributes:
        runs: int64 [kv_heads, blocks, 2, 16], addresses of runs. It and the rows stay where they are while they fit.
    """

    def __init__(self, block: int, device: torch.device) -> None:
        self._block = block
        self._buffer = torch.zeros(0, dtype=torch.uint8, device=device)
        self._runs = torch.zeros(0, dtype=torch.int64, device=device)
        self.version = -1
        self.runs = self._runs

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return self._buffer.nbytes + self._runs.nbytes

    def update(self, packed: PackedTokens, layer: int) -> None:
        """Takes over the rows as they are, unless they have not changed."""
        if self.version == packed.version:
            return
        blocks = -(-len(packed) // self._block)
        pools = [(side, pool) for side in (KEY, VALUE) for pool in packed.sides[side].pools]
        rows = [(side, width, pool.layer(width, layer).shape) for side, pool in pools for width in pool.rows]
        most = sum((count + (FILL - 1) * packed.heads * blocks) * size for _, _, (count, size) in rows)
        self._reserve(most, packed.heads * blocks * 2 * 16)
        self.runs = self._runs[: packed.heads * blocks * 2 * 16].view(packed.heads, blocks, 2, 16)
        self.runs.zero_()
        begin = torch.zeros((), dtype=torch.int64, device=packed.device)
        for side in (KEY, VALUE):
            for index, width in enumerate(WIDTHS):
                if any(width in pool.rows for pool in packed.sides[side].pools):
                    begin = self._weave(packed, layer, side, index, begin)
        self.version = packed.version

    def _weave(self, packed: PackedTokens, layer: int, side: int, index: int, begin: torch.Tensor) -> torch.Tensor:
        """Writes the runs of one width from the byte `begin` on; returns where they end."""
        width, heads, blocks = WIDTHS[index], packed.heads, self.runs.shape[1]
        size = width * packed.head_dim // 16
        mine = width_index(packed.tags[layer], side) == index  # [heads, tokens]
        padded = torch.nn.functional.pad(mine, (0, blocks * self._block - len(packed)))
        counts = padded.view(heads, blocks, self._block).sum(-1)
        filled = (counts + FILL - 1) // FILL * FILL
        ends = filled.view(-1).cumsum(0).view(heads, blocks) * size
        starts = begin + ends - filled * size
        self.runs[:, :, side, index] = self._buffer.data_ptr() + starts
        rank = padded.view(heads, blocks, self._block).cumsum(-1).view(heads, -1)[:, : len(packed)] - 1
        unit = torch.arange(size, device=packed.device)
        for number, pool in enumerate(packed.sides[side].pools):
            if width not in pool.rows:
                continue
            first, last = packed.block_range(number)
            head, token = torch.nonzero(mine[:, first:last], as_tuple=True)  # as the pool's rows stand
            token += first
            block = token // self._block
            at, row = starts[head, block], rank[head, token]
            if width == HALF:
                place = (at + row * size)[:, None] + unit
            else:
                tile = row // TILE * TILE
                held = (filled[head, block] - tile).clamp_max(TILE)
                place = (at + tile * size + row - tile)[:, None] + unit * held[:, None]
            self._buffer[place.view(-1)] = pool.layer(width, layer).reshape(-1)
        return begin + ends.view(-1)[-1]

    def _reserve(self, rows: int, runs: int) -> None:
        if self._buffer.numel() < rows:
            self._buffer = self._buffer.new_zeros(int(rows * HEADROOM) + 16)
        if self._runs.numel() < runs:
            self._runs = self._runs.new_zeros(int(runs * HEADROOM))
