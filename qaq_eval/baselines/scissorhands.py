"""Scissorhands: pivotal tokens, which recently got more than an equal share of attention, and a few recent ones
(arXiv 2305.17118).

A token is pivotal for a query if its probability, averaged over the GQA query group, is over 1/t, where t is the
number of tokens that the query attends to. The score counts the last 200 to 400 queries in two bytes: one for the
current 200 queries and one for the 200 before. One token is evicted per step, while the paper drops half of the
budget at once. The cache is then always full, which favours the baseline.
"""

from __future__ import annotations

from typing import Any

import torch

from qaq_core import Target
from qaq_core.allocation import NoObserver, Reduction
from qaq_core.models import ModelShape
from qaq_eval.baselines import eviction

NAME, PATTERN, TAKES_TARGET = "scissorhands[-<share kept>]", r"scissorhands(?:-(\d*\.?\d+))?", True
MAX_RECENT = 10
_PERIOD = 200
_CURRENT, _PREVIOUS = 0, 1


def preset(model: Any, shape: ModelShape, target: Target, share: float | None = None) -> dict[str, Any]:
    return eviction.preset(target, share, PivotCounts(), recent=lambda kept: min(MAX_RECENT, kept // 2))


class PivotCounts:
    """How often a token was pivotal: uint8 [..., 2], in the current period and in the one before."""

    bytes_per_token = 2
    every = 1
    reduction: Reduction = "max"

    def prompt(self, layers: int, heads: int, total: int, queries: int, device: torch.device) -> _PromptCounts:
        return _PromptCounts(torch.zeros(layers, heads, total, 2, dtype=torch.uint8, device=device))

    def update(self, state: torch.Tensor, probabilities: torch.Tensor, position: int) -> None:
        if position % _PERIOD == 0:
            state[..., _PREVIOUS] = state[..., _CURRENT]
            state[..., _CURRENT] = 0
        state[..., _CURRENT] += pivotal(probabilities)

    def importance(self, state: torch.Tensor) -> torch.Tensor:
        return state.float().sum(-1)

    def merge(self, before: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return (before.int() + prompt).clamp_(max=255).to(torch.uint8)


def pivotal(probabilities: torch.Tensor) -> torch.Tensor:
    """Whether each probability is over an equal share. Masked tokens have probability 0."""
    return probabilities * (probabilities > 0).sum(-1, keepdim=True) > 1


class _PromptCounts(NoObserver):
    reads_from = 0

    def __call__(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        period_start = (self._state.shape[2] - 1) // _PERIOD * _PERIOD
        pivots = pivotal(probabilities.mean(1))  # [kv_heads, n, tokens]
        state = self._state[layer, :, : pivots.shape[2]]
        current = max(0, period_start - first)
        state[..., _CURRENT] += pivots[:, current:].sum(1).to(torch.uint8)
        state[..., _PREVIOUS] += pivots[:, max(0, current - _PERIOD) : current].sum(1).to(torch.uint8)
