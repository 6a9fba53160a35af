"""Importance: the attention that one sequence's tokens have had, and so are predicted to get.

The state is the attention statistic's few bytes per token. Prefill fills it at its end; decode updates it every
`AttentionStatistic.every` steps.
"""

from __future__ import annotations

import torch

from qaq_core.allocation.allocator import Allocator
from qaq_core.allocation.attention_statistics import Observer, PromptObserver, StepObserver


class Importance:
    """The attention statistic of one sequence, by position.

    Args:
        heads: (layers, kv_heads).

    Attributes:
        state: uint8 [layers, kv_heads, tokens or more, `AttentionStatistic.bytes_per_token`].
        prompt: observes the probabilities of the prompt during prefill; None in decode.
        observed: float32 [layers, kv_heads, tokens], what the present decode step is reduced to; None if it is
            not observed.
    """

    def __init__(self, allocator: Allocator, heads: tuple[int, int], device: torch.device) -> None:
        self._allocator, self._statistic = allocator, allocator.statistic
        self._heads, self._device = heads, device
        self.state = self._new(0)
        self.prompt: PromptObserver | None = None
        self.observed: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.state.untyped_storage().nbytes()

    def bytes_of(self, tokens: int) -> int:
        """Bytes of the state of that many tokens."""
        layers, heads = self._heads
        return layers * heads * tokens * self._statistic.bytes_per_token

    def begin_prompt(self, total: int, queries: int) -> None:
        """Prefill of the last `queries` of `total` tokens begins."""
        self.prompt = self._statistic.prompt(*self._heads, total, queries, self._device)

    def end_prompt(self) -> None:
        """Takes over what the prompt observer saw."""
        assert self.prompt is not None
        seen = self.prompt.state()
        held = self.state[:, :, : seen.shape[2]]
        # Tokens of earlier turns keep their importance if this prompt did not attend to them.
        seen[:, :, : held.shape[2]] = torch.maximum(seen[:, :, : held.shape[2]], held)
        self.state, self.prompt = seen, None

    def begin_step(self, tokens: int, room: int, observe: bool) -> None:
        """A decode step begins, after which there are `tokens`; if they do not fit, the state grows to `room`."""
        if observe:
            self.observed = torch.empty(*self._heads, tokens, device=self._device)
        if self.state.shape[2] < tokens:
            grown = self._new(room)
            grown[:, :, : self.state.shape[2]] = self.state
            self.state = grown

    def end_step(self, position: int) -> None:
        """Updates the state with the query at a position, if it was observed."""
        if self.observed is not None:
            self._allocator.update_statistic(self.state, self.observed, position)
            self.observed = None

    def observer(self, layer: int, held: int) -> Observer | None:
        """The observer of a layer's probabilities in this step, or None.

        Args:
            held: tokens before those of the step.
        """
        if (prompt := self.prompt) is not None:
            return lambda probabilities, first: prompt(layer, probabilities, held + first)
        if self.observed is None:
            return None
        return StepObserver(self._statistic.reduction, self.observed[layer])

    def copy(self) -> Importance:
        """A copy; between decode steps only."""
        other = Importance(self._allocator, self._heads, self._device)
        other.state = self.state.clone()
        return other

    def close(self) -> None:
        self.state, self.prompt, self.observed = self._new(0), None, None

    def _new(self, tokens: int) -> torch.Tensor:
        dims = (*self._heads, tokens, self._statistic.bytes_per_token)
        return torch.zeros(dims, dtype=torch.uint8, device=self._device)
