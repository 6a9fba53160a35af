"""RoPE: angles by position, and vectors rotated by them."""

from __future__ import annotations

import torch


class Angles:
    """RoPE's cosines and sines by position; transforms that share matrices share these too."""

    def __init__(self, frequencies: torch.Tensor, device: torch.device) -> None:
        self._frequencies, self._device = frequencies.cpu(), device
        self._table = torch.empty(len(frequencies), 0, 2 * frequencies.shape[1])

    def __call__(self, stop: int) -> torch.Tensor:
        """[kinds, >= stop, head_dim], made on the CPU so that every machine has the same."""
        table = self._table
        if table.shape[1] < stop:
            position = torch.arange(-(-stop // 4096) * 4096, dtype=torch.float64)
            angle = position[None, :, None] * self._frequencies[:, None, :]
            # Threads may both get here: each returns the table it made, whichever is kept.
            self._table = table = torch.cat([angle.cos(), angle.sin()], -1).float().to(self._device)
        return table


def rotate_pairs(mean: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """RoPE of mean [..., d] by cosines and sines [..., d]."""
    m1, m2 = mean.chunk(2, -1)
    cos, sin = angle.chunk(2, -1)
    return torch.cat([m1 * cos - m2 * sin, m2 * cos + m1 * sin], -1)
