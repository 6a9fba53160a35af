"""No window: what a cache of fixed widths needs to know of attention, which is nothing."""

from __future__ import annotations

import torch

from qaq_core.allocation import Reduction


class NoStatistic:
    """Takes no bytes and predicts nothing."""

    bytes_per_token = 0
    every = 2**30
    reduction: Reduction = "max"

    def prompt(self, layers: int, heads: int, total: int, queries: int, device: torch.device) -> NoObserver:
        return NoObserver(torch.zeros(layers, heads, total, 0, dtype=torch.uint8, device=device))

    def update(self, state: torch.Tensor, reduction: torch.Tensor, position: int) -> None:
        pass

    def importance(self, state: torch.Tensor) -> torch.Tensor:
        return torch.zeros(state.shape[:-1], device=state.device)


class NoObserver:
    """A prompt that nobody watches."""

    def __init__(self, state: torch.Tensor) -> None:
        self._state = state

    def __call__(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        pass

    def state(self) -> torch.Tensor:
        return self._state
