"""Importance: what attention one sequence's tokens have got, and so what they are predicted to get.

The state is a window's few bytes for each token. A prompt fills it when it is over; decode folds a step in
every `Window.every` steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qaq_core.attention.reference import Observer
from qaq_core.window import PromptWatch, Reduction

if TYPE_CHECKING:
    from qaq_core.method import Method


class Importance:
    """The window statistic of one sequence, by position.

    Attributes:
        state: uint8 [layers, kv_heads, tokens or more, `Window.bytes_per_token`].
        watch: sees the probabilities of the prompt that is arriving; None in decode.
        statistic: float32 [layers, kv_heads, tokens], what the decode step under way is reduced to; None if it is
            not observed.
    """

    def __init__(self, method: Method) -> None:
        self._method, self._window = method, method.window
        self._heads = (method.shape.layers, method.shape.kv_heads)
        self.state = self._new(0)
        self.watch: PromptWatch | None = None
        self.statistic: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.state.untyped_storage().nbytes()

    def bytes_of(self, tokens: int) -> int:
        """Bytes of the state of so many tokens."""
        layers, heads = self._heads
        return layers * heads * tokens * self._window.bytes_per_token

    def begin_prompt(self, total: int, queries: int) -> None:
        """The last `queries` of `total` tokens will be computed while all of them are exact."""
        self.watch = self._window.prompt(*self._heads, total, queries, self._method.device)

    def end_prompt(self) -> None:
        """Takes over what the prompt saw."""
        assert self.watch is not None
        seen = self.watch.state()
        held = self.state[:, :, : seen.shape[2]]
        # Earlier turns' tokens keep what they were worth if this prompt did not look at them.
        seen[:, :, : held.shape[2]] = torch.maximum(seen[:, :, : held.shape[2]], held)
        self.state, self.watch = seen, None

    def begin_step(self, tokens: int, room: int, observe: bool) -> None:
        """A decode step begins, after which there are `tokens`; if they do not fit, room is made for `room`."""
        if observe:
            self.statistic = torch.empty(*self._heads, tokens, device=self._method.device)
        if self.state.shape[2] < tokens:
            grown = self._new(room)
            grown[:, :, : self.state.shape[2]] = self.state
            self.state = grown

    def end_step(self, position: int) -> None:
        """Folds in what the query at a position looked at, if it was observed."""
        if self.statistic is not None:
            self._method.allocator.observe(self.state, self.statistic, position)
            self.statistic = None

    def observer(self, layer: int, held: int) -> Observer | None:
        """Who watches a layer's probabilities in this step; None if nobody does.

        Args:
            held: tokens before those of the step.
        """
        if (watch := self.watch) is not None:
            return lambda probabilities, first: watch(layer, probabilities, held + first)
        if self.statistic is None:
            return None
        return Reduction(self._window.statistic, self.statistic[layer])

    def copy(self) -> Importance:
        """The same state in memory of its own; between steps of decode only."""
        other = Importance(self._method)
        other.state = self.state.clone()
        return other

    def close(self) -> None:
        self.state, self.watch, self.statistic = self._new(0), None, None

    def _new(self, tokens: int) -> torch.Tensor:
        dims = (*self._heads, tokens, self._window.bytes_per_token)
        return torch.zeros(dims, dtype=torch.uint8, device=self._method.device)
