"""What a decoder layer does to rows of numbers outside of attention, in torch: the definition of `kernels.dense`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from qaq_core.kernels.dense import Linear


class TorchDense:
    def linear(self, weights: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> Linear:
        """The outputs of linear layers that take the same rows, side by side: [rows, all outputs] of [rows, inputs].

        Args:
            weights: [outputs, inputs] and a bias [outputs] of each.
        """
        held = [(w.detach(), None if b is None else b.detach()) for w, b in weights]
        return lambda x: torch.cat([functional.linear(x, w, b) for w, b in held], -1)

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """RMS norm of rows [rows, size], x / rms(x) * weight, after `added` was added to them in place."""
        if added is not None:
            x += added
        return functional.rms_norm(x, weight.shape, weight, epsilon)

    def rotate(
        self,
        joint: torch.Tensor,
        heads: tuple[int, int, int],
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        epsilon: float,
        table: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [rows, heads, head_dim] of rows that have them side by side.

        Args:
            heads: query heads, KV heads, head_dim.
            norms: [head_dim], weights of RMS norms of queries and of keys before the rotation.
            table: cosines and sines [rows, head_dim] of the rows' positions.
        """
        query_heads, kv_heads, dim = heads
        query, key, value = joint.unflatten(-1, (-1, dim)).split([query_heads, kv_heads, kv_heads], 1)
        if norms is not None:
            query, key = (self.norm(x, w, epsilon) for x, w in zip((query, key), norms, strict=True))
        cos, sin = (part.unsqueeze(1) for part in table)

        def turned(x: torch.Tensor) -> torch.Tensor:
            low, high = x.chunk(2, -1)
            return x * cos + torch.cat([-high, low], -1) * sin

        return turned(query), turned(key), value

    def gate(self, both: torch.Tensor, kind: str) -> torch.Tensor:
        """gate(first half) * second half of rows [rows, 2 * size]; kind is one of `GATES`."""
        gate, up = both.chunk(2, -1)
        return (functional.silu(gate) if kind == "silu" else functional.gelu(gate, approximate="tanh")) * up
