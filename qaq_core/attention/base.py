"""What an attention kernel is, and what a layer attends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from qaq_core.allocation.attention_statistics import Observer
from qaq_core.attention.reference import LayerTokens


class LayerInput(NamedTuple):
    """The new tokens of one layer, of a batch or of one sequence.

    Attributes:
        query: [batch, query_heads, n, head_dim]. keys, values: [batch, kv_heads, n, head_dim]. All after RoPE; without
            the batch dim for one sequence.
        scaling: factor on the scores.
        sliding_window: positions that a query sees, itself included; None for all.
    """

    layer: int
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scaling: float
    sliding_window: int | None

    def of(self, sequence: int, columns: slice) -> LayerInput:
        """One sequence's columns."""
        query, keys, values = (part[sequence, :, columns] for part in (self.query, self.keys, self.values))
        return self._replace(query=query, keys=keys, values=values)

    def rows(self, rows: list[int]) -> LayerInput:
        """Some sequences of a batch."""
        return self._replace(query=self.query[rows], keys=self.keys[rows], values=self.values[rows])


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
