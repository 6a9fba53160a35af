"""Frames: the coordinates in which rows are quantized.

`PlainFrame` leaves rows as they are (the paper). `LinearFrame` centers them and multiplies them with a matrix of
their layer and head:

    key   y = K·(k - RoPE(μ, t))     score  q·k = (K⁻ᵀ·q)·y + q·RoPE(μ, t)
    value y = V·(v - μ_V)            output Σp·v = V⁻¹·Σp·y + (Σp)·μ_V

with μ the static mean of a head's keys before RoPE and t the token's position. Worker and cache service must make
the same rows: products are taken in double precision and rounded once, so that the order of their sums does not
show.
"""

from __future__ import annotations

from typing import Protocol

import torch

from qaq_core.pages import KEY


class Frame(Protocol):
    name: str

    def rows(self, side: int, originals: torch.Tensor, start: int) -> torch.Tensor:
        """Rows float32 of originals [layers, kv_heads, tokens, head_dim] of positions start, start+1, …."""
        ...

    def rows_at(
        self, side: int, originals: torch.Tensor, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        """Rows float32 of originals [n, head_dim] of those layers, heads and positions, int64 [n]."""
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

    def rows(self, side: int, originals: torch.Tensor, start: int) -> torch.Tensor:
        return originals.float()

    def rows_at(
        self, side: int, originals: torch.Tensor, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
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


class LinearFrame:
    """Centered rows times a matrix.

    Args:
        key_matrix, value_matrix: K and V [layers, kv_heads, head_dim, head_dim], invertible, of any dtype.
        key_mean: [layers, kv_heads, head_dim], mean of the keys before RoPE (after it, for a model without).
        value_mean: [layers, kv_heads, head_dim].
        frequencies: float64 [kinds, head_dim/2], RoPE's angle per position and pair (i, i + head_dim/2).
        kind: int64 [layers], which frequencies a layer uses.
    """

    name = "linear"

    def __init__(
        self,
        key_matrix: torch.Tensor,
        value_matrix: torch.Tensor,
        key_mean: torch.Tensor,
        value_mean: torch.Tensor,
        frequencies: torch.Tensor,
        kind: torch.Tensor,
    ) -> None:
        self.key_matrix, self.value_matrix = key_matrix, value_matrix
        self.key_mean, self.value_mean = key_mean.float(), value_mean.float()
        self.frequencies, self.kind = frequencies.double(), kind.long()
        self._matrices = (key_matrix.double(), value_matrix.double())
        self._key_inverse, self._value_inverse = (torch.linalg.inv(matrix).float() for matrix in self._matrices)
        self._trig = torch.empty(len(frequencies), 0, 2 * frequencies.shape[1])
        self._kinds: list[int] = self.kind.tolist()

    def to(self, device: torch.device) -> LinearFrame:
        return LinearFrame(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "key_matrix": self.key_matrix,
            "value_matrix": self.value_matrix,
            "key_mean": self.key_mean,
            "value_mean": self.value_mean,
            "frequencies": self.frequencies,
            "kind": self.kind,
        }

    def rows(self, side: int, originals: torch.Tensor, start: int) -> torch.Tensor:
        tokens = originals.shape[2]
        rows = torch.empty(originals.shape, device=originals.device)
        for layer, own in enumerate(originals):
            center = self.value_mean[layer].unsqueeze(1)
            if side == KEY:
                angles = self._angles(start + tokens)[self._kinds[layer], start : start + tokens]
                center = rotate_pairs(self.key_mean[layer].unsqueeze(1), angles)
            rows[layer] = (own.float() - center).double() @ self._matrices[side][layer].mT
        return rows

    def rows_at(
        self, side: int, originals: torch.Tensor, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        center = (self.key_mean if side == KEY else self.value_mean)[layer, head]
        if side == KEY and len(position):
            center = rotate_pairs(center, self._angles(int(position.max()) + 1)[self.kind[layer], position])
        centered = (originals.float() - center).double()
        rows = torch.empty(originals.shape, device=originals.device)
        heads = self.key_mean.shape[1]
        place = layer * heads + head
        order = place.argsort()
        counts = torch.bincount(place)
        present = torch.nonzero(counts).squeeze(1)
        for where, mine in zip(present.tolist(), order.split(counts[present].tolist()), strict=True):
            rows[mine] = (centered[mine] @ self._matrices[side][where // heads, where % heads].mT).float()
        return rows

    def query(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        inverse = self._key_inverse[layer]
        return (query.reshape(len(inverse), -1, query.shape[-1]) @ inverse).view(query.shape)

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
        inverse, mean = self._value_inverse[layer], self.value_mean[layer]
        restored = (output.reshape(len(inverse), -1, output.shape[-1]) @ inverse.mT).view(output.shape)
        centers = mass.view(len(mean), -1, 1) * mean.unsqueeze(1)
        return restored + centers.view(output.shape)

    def _angles(self, stop: int) -> torch.Tensor:
        """[kinds, >= stop, head_dim]: cosines and sines, made on the CPU so that every machine has the same."""
        trig = self._trig
        if trig.shape[1] < stop:
            position = torch.arange(-(-stop // 4096) * 4096, dtype=torch.float64)
            angle = position[None, :, None] * self.frequencies.cpu()[:, None, :]
            # Threads may both get here: each returns the table it made, whichever is kept.
            self._trig = trig = torch.cat([angle.cos(), angle.sin()], -1).float().to(self.key_mean.device)
        return trig


def rotate_pairs(mean: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """RoPE of mean [..., d] by cosines and sines [..., d]."""
    m1, m2 = mean.chunk(2, -1)
    cos, sin = angle.chunk(2, -1)
    return torch.cat([m1 * cos - m2 * sin, m2 * cos + m1 * sin], -1)


def hadamard(dim: int) -> torch.Tensor:
    """Orthogonal Walsh–Hadamard matrix with random signs [dim, dim], float64.

    In blocks of the largest power of two that divides dim; the signs are the same for every model of that dim.
    """
    block = torch.ones(1, 1, dtype=torch.float64)
    while dim % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    generator = torch.Generator().manual_seed(dim)
    signs = torch.randint(0, 2, (dim,), generator=generator).double() * 2 - 1
    return torch.block_diag(*[block * len(block) ** -0.5] * (dim // len(block))) * signs
