"""Scissorhands: pivotal tokens, which lately had more than their share of attention, and a few recent ones
(arXiv 2305.17118).

Of a history of the last 400 queries is counted how often a token got more than 1/t, t the tokens that the query
saw (the mean over its head's query group). The counts are two of a byte, of the half history that is running and
of the one before it, so that the history is 200 to 400 queries long. One token is evicted a step, where the paper
drops half of the budget at once: the cache is always full, which is in the rival's favour.
"""

from __future__ import annotations

from typing import Any

import torch

from qaq_core import Target
from qaq_core.allocation import NoObserver, Reduction
from qaq_core.models import ModelShape
from qaq_eval.baselines import eviction

NAME, PATTERN = "scissorhands[-<share kept>]", r"scissorhands(?:-(\d*\.?\d+))?"
TARGETED = True
RECENT = 10
_HALF_HISTORY = 200
_NOW, _BEFORE = 0, 1


def parts(model: Any, shape: ModelShape, target: Target, share: float | None = None) -> dict[str, Any]:
    return eviction.parts(shape, target, share, PivotCounts(), recent=lambda kept: min(RECENT, kept // 2))


class PivotCounts:
    """How often a token was pivotal lately: uint8 [..., 2], in this half of the history and in the one before."""

    bytes_per_token = 2
    every = 1
    reduction: Reduction = "max"

    def prompt(self, layers: int, heads: int, total: int, queries: int, device: torch.device) -> _PromptCounts:
        return _PromptCounts(torch.zeros(layers, heads, total, 2, dtype=torch.uint8, device=device))

    def update(self, state: torch.Tensor, reduction: torch.Tensor, position: int) -> None:
        if position % _HALF_HISTORY == 0:
            state[..., _BEFORE] = state[..., _NOW]
            state[..., _NOW] = 0
        state[..., _NOW] += pivotal(reduction)

    def importance(self, state: torch.Tensor) -> torch.Tensor:
        return state.float().sum(-1)

    def join(self, held: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return (held.int() + seen).clamp_(max=255).to(torch.uint8)


def pivotal(probabilities: torch.Tensor) -> torch.Tensor:
    """Whether each is over its share; what a query does not see has a probability of 0."""
    return probabilities * (probabilities > 0).sum(-1, keepdim=True) > 1


class _PromptCounts(NoObserver):
    def __call__(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        running = (self._state.shape[2] - 1) // _HALF_HISTORY * _HALF_HISTORY
        found = pivotal(probabilities.mean(1))  # [kv_heads, n, tokens]
        mine = self._state[layer, :, : found.shape[2]]
        now = max(0, running - first)
        mine[..., _NOW] += found[:, now:].sum(1).to(torch.uint8)
        mine[..., _BEFORE] += found[:, max(0, now - _HALF_HISTORY) : now].sum(1).to(torch.uint8)
