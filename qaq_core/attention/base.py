"""What an attention kernel is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from qaq_core.allocation.attention_statistics import Observer
from qaq_core.attention.reference import LayerTokens


class Attention(Protocol):
    """Causal attention of a sequence's last positions over all its tokens in one layer."""

    @property
    def name(self) -> str: ...

    def __call__(
        self,
        query: torch.Tensor,
        tokens: LayerTokens,
        scaling: float,
        sliding_window: int | None = None,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """See `ReferenceAttention`, which defines what is computed."""
        ...

    def batch(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[Observer | None],
    ) -> torch.Tensor:
        """The same for several sequences, query and result [batch, query_heads, n, head_dim]."""
        ...
