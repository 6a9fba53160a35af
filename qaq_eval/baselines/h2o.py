"""H2O, heavy hitters: the tokens with the most accumulated attention, and as many recent ones (arXiv 2306.14048).

A token's score is the sum over all queries so far of the probability it got, averaged over the GQA query group.
"""

from __future__ import annotations

from typing import Any

import torch

from qaq_core import Target
from qaq_core.allocation import NoObserver, Reduction
from qaq_core.models import ModelShape
from qaq_eval.baselines import eviction

NAME, PATTERN, TAKES_TARGET = "h2o[-<share kept>]", r"h2o(?:-(\d*\.?\d+))?", True


def preset(model: Any, shape: ModelShape, target: Target, share: float | None = None) -> dict[str, Any]:
    return eviction.preset(target, share, AccumulatedAttention(), recent=lambda kept: kept // 2)


class AccumulatedAttention:
    """The sum of a token's probabilities: one float32 in four bytes of state."""

    bytes_per_token = 4
    every = 1
    reduction: Reduction = "max"

    def prompt(self, layers: int, heads: int, total: int, queries: int, device: torch.device) -> _PromptSums:
        return _PromptSums(torch.zeros(layers, heads, total, 4, dtype=torch.uint8, device=device))

    def update(self, state: torch.Tensor, probabilities: torch.Tensor, position: int) -> None:
        sums(state).add_(probabilities)

    def importance(self, state: torch.Tensor) -> torch.Tensor:
        return sums(state).clone()

    def merge(self, before: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return (sums(before) + sums(prompt)).unsqueeze(-1).view(torch.uint8)


def sums(state: torch.Tensor) -> torch.Tensor:
    """State uint8 [..., 4] as float32 [...], in the same memory."""
    return state.view(torch.float32).squeeze(-1)


class _PromptSums(NoObserver):
    reads_from = 0

    def __call__(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        sums(self._state)[layer, :, : probabilities.shape[3]] += probabilities.mean(1).sum(1)
