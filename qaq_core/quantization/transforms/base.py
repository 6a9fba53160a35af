"""What a transform is: the coordinates in which rows are quantized."""

from __future__ import annotations

from typing import Protocol

import torch


class Transform(Protocol):
    name: str

    @property
    def kept_bytes(self) -> int:
        """Bytes of what a sequence's own transform has made of its tensors and keeps."""
        ...

    def to(self, device: torch.device) -> Transform:
        """The same transform with its tensors on a device."""
        ...

    def rows(self, side: int, originals: torch.Tensor, start: int) -> torch.Tensor:
        """Rows float32 of originals [layers, kv_heads, tokens, head_dim] of positions start, start+1, …."""
        ...

    def rows_at(
        self, side: int, originals: torch.Tensor, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        """Rows float32 of originals [n, head_dim] of those layers, heads and positions, int64 [n]."""
        ...

    def query(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Queries [heads, n, head_dim] to multiply with packed keys."""
        ...

    def center_scores(self, layer: int, query: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
        """What centering subtracted from q·k at positions start..stop-1: [heads, n, stop-start], or None for 0."""
        ...

    def center(self, layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The parts of `center_scores`, or None for 0.

        Returns:
            means before RoPE [kv_heads, head_dim]; RoPE's cosines and sines [>= stop, head_dim] from position 0.
        """
        ...

    def restore(self, layer: int, output: torch.Tensor) -> torch.Tensor:
        """Sums over packed values [heads, n, head_dim], transformed back; `value_center` is not added."""
        ...

    def value_center(self, layer: int) -> torch.Tensor | None:
        """What centering subtracted from values: [kv_heads, head_dim], or None for 0."""
        ...

    def centered_on(self, originals: torch.Tensor, start: int) -> Transform:
        """The same transform centered on the means of these tokens.

        Args:
            originals: [layers, 2, kv_heads, n, head_dim] of positions start, start+1, ….
        """
        ...

    def maps(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The matrices of `query` and `restore`, without the rotation; None for the identity.

        Returns:
            [layers, kv_heads, head_dim, head_dim], multiplied from the right: with a query, and with an output.
        """
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything needed to make the same transform elsewhere."""
        ...
