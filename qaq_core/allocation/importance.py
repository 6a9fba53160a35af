"""Importance: the attention that one sequence's tokens have had, and so are predicted to get.

The state is the attention statistic's few bytes per token. Prefill fills it at its end; decode updates it every
`AttentionStatistic.every` steps.
"""

from __future__ import annotations

import torch

from qaq_core.allocation.allocator import Allocator
from qaq_core.allocation.attention_statistics import LayerObserver, Observer, PromptObserver, StepObserver


class Importance:
    """The attention statistic of one sequence, by position.

    Args:
        heads: (layers, kv_heads).
        query_heads: every query is observed, with the sums of its scores, and not just those that the statistic takes
            in; None if not.

    Attributes:
        state: uint8 [layers, kv_heads, tokens or more, `AttentionStatistic.bytes_per_token`].
        prompt: observes the probabilities of the prompt during prefill; None in decode.
        observed: position of a query of the present pass -> float32 [layers, kv_heads, position + 1], what its
            probabilities are reduced to. Queries that are not observed have none.
        log_sums: position of a query -> float32 [layers, query_heads], log Σ e^score.
    """

    def __init__(
        self, allocator: Allocator, heads: tuple[int, int], device: torch.device, query_heads: int | None = None
    ) -> None:
        self._allocator, self._statistic = allocator, allocator.statistic
        self._heads, self._device, self._query_heads = heads, device, query_heads
        self.state = self._new(0)
        self.prompt: PromptObserver | None = None
        self.observed: dict[int, torch.Tensor] = {}
        self.log_sums: dict[int, torch.Tensor] = {}
        self._origin = 0

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

    def begin_step(self, first: int, stop: int, room: int, origin: int) -> None:
        """A pass of decode steps begins, with the queries at positions first..stop-1.

        Args:
            room: tokens that the state grows to if `stop` do not fit.
            origin: position of an observed query; every `AttentionStatistic.every`-th from there is observed.
        """
        self._origin = origin
        self.observed = {
            position: torch.empty(*self._heads, position + 1, device=self._device)
            for position in range(first, stop)
            if self._query_heads is not None or self._is_taken(position)
        }
        if self._query_heads is not None:
            layers = self._heads[0]
            self.log_sums = {at: torch.empty(layers, self._query_heads, device=self._device) for at in self.observed}
        if self.state.shape[2] < stop:
            grown = self._new(max(room, stop))
            grown[:, :, : self.state.shape[2]] = self.state
            self.state = grown

    def view(self, length: int, first: int = 0) -> torch.Tensor:
        """Predicted attention of the tokens from `first` to `length`, float32 [layers, kv_heads, length - first]. There
        are fewer while a prompt is computed."""
        return self._statistic.importance(self.state[:, :, first:length])

    def end_step(self, position: int) -> None:
        """Updates the state with the query at a position, if the statistic takes it in."""
        observed = self.observed.pop(position, None)
        self.log_sums.pop(position, None)
        if observed is not None and self._is_taken(position):
            self._allocator.update_statistic(self.state, observed, position)

    def _is_taken(self, position: int) -> bool:
        return (position - self._origin) % self._statistic.every == 0

    def forget_queries(self) -> None:
        """Forgets the queries of the present pass that were not taken in."""
        self.observed, self.log_sums = {}, {}

    def crop(self, tokens: int) -> None:
        """Keeps the state of the first `tokens` tokens, and forgets the queries behind them."""
        self.observed = {position: seen for position, seen in self.observed.items() if position < tokens}
        self.log_sums = {position: sums for position, sums in self.log_sums.items() if position < tokens}
        if self.state.shape[2] > tokens:
            self.state = self.state[:, :, :tokens].clone()

    def observer(self, layer: int, position: int) -> Observer | None:
        """The observer of a layer's probabilities, of the prompt's queries from a position on or of the one there."""
        if self.prompt is not None:
            return LayerObserver(self.prompt, layer, position)
        observed = self.observed.get(position)
        if observed is None:
            return None
        sums = self.log_sums.get(position)
        return StepObserver(self._statistic.reduction, observed[layer], None if sums is None else sums[layer])

    def copy(self) -> Importance:
        """A copy; between decode steps only."""
        other = Importance(self._allocator, self._heads, self._device, self._query_heads)
        other.state = self.state.clone()
        return other

    def close(self) -> None:
        self.state, self.prompt = self._new(0), None
        self.forget_queries()

    def _new(self, tokens: int) -> torch.Tensor:
        dims = (*self._heads, tokens, self._statistic.bytes_per_token)
        return torch.zeros(dims, dtype=torch.uint8, device=self._device)
