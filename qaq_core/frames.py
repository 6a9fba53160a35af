"""Frames: the coordinates in which rows are quantized.

`PlainFrame` leaves rows as they are (the paper). `RotatedFrame` centers and rotates them:

    key   y = R·(k - RoPE(μ, t))     score  q·k = (R·q)·y + q·RoPE(μ, t)
    value y = R·(v - μ_V)            output Σp·v = Rᵀ·Σp·y + (Σp)·μ_V

with μ the static mean of a head's keys before RoPE, t the token's position and R a (block) Hadamard
matrix with random signs. Worker and cache service must agree bit for bit, so rows are made of
elementwise operations in a fixed order only (no matrix product, whose sums depend on the batch).
"""

from __future__ import annotations

from typing import Protocol

import torch

from qaq_core.pages import KEY

Index = torch.Tensor


class Frame(Protocol):
    name: str

    def rows(self, side: int, originals: torch.Tensor, layer: Index, head: Index, position: Index) -> torch.Tensor:
        """Rows [..., head_dim], float32, of originals of the same shape; the indices broadcast to [...]."""
        ...

    def query(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Queries [heads, n, head_dim] as they meet packed keys."""
        ...

    def center_scores(self, layer: int, query: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
        """What centering took from q·k at positions start..stop-1: [heads, n, stop-start], or None for 0."""
        ...

    def center(self, layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What `center_scores` is made of, or None for 0.

        Returns:
            means before RoPE [kv_heads, head_dim]; RoPE's cosines and sines [>= stop, head_dim] from position 0.
        """
        ...

    def restore(self, layer: int, output: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """Output [heads, n, head_dim] summed over packed values, of total weight mass [heads, n], as it was."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything needed to make the same frame elsewhere."""
        ...


class PlainFrame:
    """Rows are the originals."""

    name = "plain"

    def rows(self, side: int, originals: torch.Tensor, layer: Index, head: Index, position: Index) -> torch.Tensor:
        return originals.float()

    def query(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        return query

    def center_scores(self, layer: int, query: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
        return None

    def center(self, layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    def restore(self, layer: int, output: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        return output

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


class RotatedFrame:
    """Centered and rotated rows.

    Args:
        key_mean: [layers, kv_heads, head_dim], mean of the keys before RoPE (after it, for a model without).
        value_mean: [layers, kv_heads, head_dim].
        frequencies: float64 [kinds, head_dim/2], RoPE's angle per position and pair (i, i + head_dim/2).
        kind: int64 [layers], which frequencies a layer uses.
        signs: [head_dim] of ±1.
    """

    name = "rotated"

    def __init__(
        self,
        key_mean: torch.Tensor,
        value_mean: torch.Tensor,
        frequencies: torch.Tensor,
        kind: torch.Tensor,
        signs: torch.Tensor,
    ) -> None:
        self.key_mean, self.value_mean = key_mean.float(), value_mean.float()
        self.frequencies, self.kind, self.signs = frequencies.double(), kind.long(), signs.float()
        self._trig = torch.empty(len(frequencies), 0, 2 * frequencies.shape[1])
        self._kinds: list[int] = self.kind.tolist()
        self._matrix = hadamard(torch.eye(len(signs)) * self.signs.cpu()).to(signs.device)

    def to(self, device: torch.device) -> RotatedFrame:
        return RotatedFrame(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "key_mean": self.key_mean,
            "value_mean": self.value_mean,
            "frequencies": self.frequencies,
            "kind": self.kind,
            "signs": self.signs,
        }

    def rows(self, side: int, originals: torch.Tensor, layer: Index, head: Index, position: Index) -> torch.Tensor:
        mean = (self.key_mean if side == KEY else self.value_mean)[layer, head]
        if side == KEY:
            kind = self.kind[layer] if len(self.frequencies) > 1 else torch.zeros((), dtype=torch.long)
            angle = self._angles(int(position.max()) + 1 if position.numel() else 0)[kind, position]
            mean = _rotate_pairs(mean, angle)
        return hadamard((originals.float() - mean) * self.signs)

    def query(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        return query @ self._matrix

    def center_scores(self, layer: int, query: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
        group = query.shape[0] // self.key_mean.shape[1]
        mean = self.key_mean[layer].repeat_interleave(group, 0).unsqueeze(1)
        q1, q2 = query.chunk(2, -1)
        m1, m2 = mean.chunk(2, -1)
        weights = torch.cat([q1 * m1 + q2 * m2, q2 * m1 - q1 * m2], -1)
        return weights @ self._angles(stop)[self._kinds[layer], start:stop].T

    def center(self, layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.key_mean[layer], self._angles(stop)[self._kinds[layer]]

    def restore(self, layer: int, output: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        mean = self.value_mean[layer]
        centers = mass.view(len(mean), -1, 1) * mean.unsqueeze(1)
        return output @ self._matrix.T + centers.view(output.shape)

    def _angles(self, stop: int) -> torch.Tensor:
        """[kinds, >= stop, head_dim]: cosines and sines, made on the CPU so that every machine has the same."""
        trig = self._trig
        if trig.shape[1] < stop:
            position = torch.arange(-(-stop // 4096) * 4096, dtype=torch.float64)
            angle = position[None, :, None] * self.frequencies.cpu()[:, None, :]
            # Threads may both get here: each returns the table it made, whichever is kept.
            self._trig = trig = torch.cat([angle.cos(), angle.sin()], -1).float().to(self.signs.device)
        return trig


def _rotate_pairs(mean: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """RoPE of mean [..., d] by cosines and sines [..., d]."""
    m1, m2 = mean.chunk(2, -1)
    cos, sin = angle.chunk(2, -1)
    return torch.cat([m1 * cos - m2 * sin, m2 * cos + m1 * sin], -1)


def hadamard(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal Walsh–Hadamard transform of the last dim, in blocks of its largest power-of-two divisor."""
    dim = rows.shape[-1]
    block = dim & -dim
    work = rows.reshape(*rows.shape[:-1], dim // block, block)
    half = 1
    while half < block:
        pairs = work.view(*work.shape[:-1], block // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        work = torch.stack([first + second, first - second], -2).view(work.shape)
        half *= 2
    return work.view(rows.shape) * block**-0.5


def random_signs(dim: int) -> torch.Tensor:
    """The ±1 diagonal, the same for every model of that head_dim."""
    generator = torch.Generator().manual_seed(dim)
    return torch.randint(0, 2, (dim,), generator=generator).float() * 2 - 1
