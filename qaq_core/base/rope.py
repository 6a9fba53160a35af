"""RoPE: angles by position, and vectors rotated by them."""

from __future__ import annotations

import torch

TABLE_BYTES = 32 << 20
"""Positions whose table would be larger are computed one by one where only some are asked for."""

_BLOCK = 4096


class Angles:
    """RoPE's cosines and sines by position; transforms that share matrices share these too.

    They are made on the CPU, so that every machine has the same.
    """

    def __init__(self, frequencies: torch.Tensor, device: torch.device) -> None:
        self._frequencies, self._device = frequencies.cpu(), device
        self._table = torch.empty(len(frequencies), 0, 2 * frequencies.shape[1])

    def __call__(self, stop: int) -> torch.Tensor:
        """[kinds, >= stop, head_dim]."""
        table = self._table
        if table.shape[1] < stop:
            # Threads may both get here: each returns the table it made, whichever is kept.
            parts = [table] if table.shape[1] else []
            for start in range(table.shape[1], stop, _BLOCK):
                position = torch.arange(start, start + _BLOCK, dtype=torch.float64)
                angle = position[None, :, None] * self._frequencies[:, None, :]
                parts.append(torch.cat([angle.cos(), angle.sin()], -1).float().to(self._device))
            self._table = table = torch.cat(parts, 1)
        return table

    def far(self, stop: int) -> bool:
        """Whether a table of so many positions is too large for some of them."""
        kinds, held, dim = self._table.shape
        return stop > held and kinds * stop * dim * self._table.itemsize > TABLE_BYTES

    def at(self, kind: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """[n, head_dim] of single positions, of frequencies of that kind; both int64 [n]."""
        stop = int(position.max()) + 1 if len(position) else 0
        if not self.far(stop):
            return self(stop)[kind, position]
        angle = position.cpu().double()[:, None] * self._frequencies[kind.cpu()]
        return torch.cat([angle.cos(), angle.sin()], -1).float().to(self._device)


def rotate_pairs(mean: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """RoPE of mean [..., d] by cosines and sines [..., d]."""
    m1, m2 = mean.chunk(2, -1)
    cos, sin = angle.chunk(2, -1)
    return torch.cat([m1 * cos - m2 * sin, m2 * cos + m1 * sin], -1)
