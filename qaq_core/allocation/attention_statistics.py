"""Attention statistics: the attention that a token is predicted to get, from the attention it has had.

A statistic keeps a few bytes per (layer, KV head, token), which count as resident. It reduces the probabilities of
each observed decode step to one number per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from qaq_core.base.constants import constant_on

LOG2_FLOOR = -40.0
"""log2 of the smallest number that a byte distinguishes from 0; the largest number is 1."""

LOG2_STEP = -LOG2_FLOOR / 255
_LOG_TABLE = torch.exp2(LOG2_FLOOR + LOG2_STEP * torch.arange(256, dtype=torch.float32))
_LOG_TABLE[0] = 0.0

DITHER = 1_000_003
"""Distance between the dither sequences of two consecutive seeds."""


Observer = Callable[[torch.Tensor, int], None]
"""Called with probabilities [kv_heads, group, n, tokens] and the index of the first of the n queries."""

Reduction = Literal["max", "mean_square"]
"""What a decode step's probabilities are reduced to, over the query group."""


@dataclass(frozen=True)
class StepObserver:
    """Observer of a decode step that reduces the query group's probabilities to one number per token.

    A kernel may write `into` itself instead of calling the observer.

    Attributes:
        into: float32 [kv_heads, tokens], contiguous.
        log_sums: float32 [query_heads], contiguous, of log Σ e^score; None if they are not asked for. Whoever has the
            scores writes them.
    """

    reduction: Reduction
    into: torch.Tensor
    log_sums: torch.Tensor | None = None

    def __call__(self, probabilities: torch.Tensor, first: int) -> None:
        """Takes in probabilities [kv_heads, group, 1, tokens]."""
        if self.reduction == "max":
            self.into.copy_(probabilities.amax((1, 2)))
        else:
            self.into.copy_(probabilities.square().mean((1, 2)))


class AttentionStatistic(Protocol):
    bytes_per_token: int
    every: int
    """A decode step is observed once in this many."""

    reduction: Reduction
    """How the probabilities of a decode step are reduced, see `StepObserver`."""

    def prompt(self, layers: int, heads: int, total: int, queries: int, device: torch.device) -> PromptObserver:
        """An observer of the prefill of the last `queries` of `total` tokens."""
        ...

    def update(self, state: torch.Tensor, observed: torch.Tensor, position: int) -> None:
        """Updates the state in place with what the query at a position observed, [layers, kv_heads, tokens]."""
        ...

    def importance(self, state: torch.Tensor) -> torch.Tensor:
        """Predicted attention, float32 [layers, kv_heads, tokens], of state uint8 [..., bytes_per_token]."""
        ...


class PromptObserver(Protocol):
    reads_from: int
    """Position of the first query whose probabilities it takes in; a kernel may leave out those before."""

    def __call__(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        """Takes in probabilities [kv_heads, group, n, tokens] of prompt queries first..first+n-1."""
        ...

    def state(self) -> torch.Tensor:
        """The state after the prompt, uint8 [layers, kv_heads, total, bytes_per_token]."""
        ...


@dataclass(frozen=True)
class LayerObserver:
    """Observer of one layer in a pass over a prompt whose first query is at a position.

    A kernel may fill in `PromptMeans` itself instead of calling the observer.
    """

    prompt: PromptObserver
    layer: int
    position: int

    def __call__(self, probabilities: torch.Tensor, first: int) -> None:
        """Takes in probabilities [kv_heads, group, n, tokens] of queries first.. of the pass."""
        self.prompt(self.layer, probabilities, self.position + first)


def to_log_byte(value: torch.Tensor, dither: int | None = None) -> torch.Tensor:
    """uint8 log code of numbers in [0, 1].

    Dithered rounding preserves small changes on average; the same seed gives the same thresholds.
    """
    code = (value.clamp(2.0**LOG2_FLOOR, 1.0).log2() - LOG2_FLOOR) / LOG2_STEP
    threshold = 0.5 if dither is None else _thresholds(code, dither)
    return (code + threshold).floor_().clamp_(0, 255).to(torch.uint8)


def _thresholds(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Evenly distributed numbers in [0, 1): a Weyl sequence, which needs no random generator."""
    place = torch.arange(like.numel(), device=like.device, dtype=torch.int64) + DITHER * seed
    return (((place * 2_654_435_769) >> 16) & 0xFFFF).view(like.shape) / 65536.0


def from_log_byte(code: torch.Tensor) -> torch.Tensor:
    """float32 of log codes; code 0 is 0."""
    return constant_on(_LOG_TABLE, code.device)[code.int()]


class AttentionWindow:
    """The paper's attention window: the largest probability of the last n steps (section 4.2)."""

    every = 1
    reduction: Reduction = "max"

    def __init__(self, steps: int = 5) -> None:
        self.bytes_per_token = self.steps = steps

    def prompt(self, layers: int, heads: int, total: int, queries: int, device: torch.device) -> PromptObserver:
        return _LastSteps(self.steps, layers, heads, total, device)

    def update(self, state: torch.Tensor, observed: torch.Tensor, position: int) -> None:
        state[:, :, : observed.shape[2], position % self.steps] = to_log_byte(observed)

    def importance(self, state: torch.Tensor) -> torch.Tensor:
        return from_log_byte(state.amax(-1))


class _LastSteps:
    """Fills an attention window with the last n prompt queries."""

    def __init__(self, steps: int, layers: int, heads: int, total: int, device: torch.device) -> None:
        self.reads_from = max(0, total - steps)
        self._state = torch.zeros(layers, heads, total, steps, dtype=torch.uint8, device=device)

    def __call__(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        n, steps = probabilities.shape[2], self._state.shape[-1]
        for query in range(max(0, self.reads_from - first), n):
            self._state[layer, :, : probabilities.shape[3], (first + query) % steps] = to_log_byte(
                probabilities[:, :, query].amax(1)
            )

    def state(self) -> torch.Tensor:
        return self._state


class DecayingMeanSquare:
    """Mean squared attention: of the last prompt queries, then decaying with a half-life in steps.

    s = mean p² over the last `queries` prompt queries + peak_share · max p² over prompt queries at least
    `distance` positions away; in decode an exponential moving average of the group's mean p².
    """

    bytes_per_token = 1
    reduction: Reduction = "mean_square"

    def __init__(
        self,
        half_life: float = 64.0,
        queries: int = 256,
        distance: int = 32,
        peak_share: float = 0.03 / 256,
        every: int = 4,
    ) -> None:
        self.half_life, self.queries, self.distance, self.peak_share = half_life, queries, distance, peak_share
        self.every = every

    def prompt(self, layers: int, heads: int, total: int, queries: int, device: torch.device) -> PromptObserver:
        return PromptMeans(self, layers, heads, total, min(queries, self.queries), device)

    def update(self, state: torch.Tensor, observed: torch.Tensor, position: int) -> None:
        known = state[:, :, : observed.shape[2], 0]
        known.copy_(to_log_byte(torch.lerp(observed, from_log_byte(known), self.keep), dither=position))

    @property
    def keep(self) -> float:
        """Weight of the old value when a step is folded in."""
        return float(0.5 ** (self.every / self.half_life))

    def importance(self, state: torch.Tensor) -> torch.Tensor:
        return from_log_byte(state[..., 0])


class PromptMeans:
    """Sums and peaks of p², averaged over the query group, while a prompt is computed.

    Attributes:
        sums: float32 [layers, kv_heads, total], over the queries from `summed_from` on.
        peaks: the same shape, the largest of a query at least `distance` positions away.
    """

    reads_from = 0

    def __init__(
        self, statistic: DecayingMeanSquare, layers: int, heads: int, total: int, queries: int, device: torch.device
    ) -> None:
        self._peak_share, self._queries = statistic.peak_share, queries
        self.distance, self.summed_from = statistic.distance, total - queries
        self.sums = torch.zeros(layers, heads, total, device=device)
        self.peaks = torch.zeros(layers, heads, total, device=device)

    def __call__(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        tokens = probabilities.shape[3]
        squares = probabilities.square().mean(1)  # [kv_heads, n, tokens]
        last = max(0, self.summed_from - first)
        if last < squares.shape[1]:
            self.sums[layer, :, :tokens] += squares[:, last:].sum(1)
        far = squares.tril_(first - self.distance).amax(1)
        peak = self.peaks[layer, :, :tokens]
        torch.maximum(peak, far, out=peak)

    def state(self) -> torch.Tensor:
        mean = self.sums / self._queries
        return to_log_byte(mean + self._peak_share * self.peaks).unsqueeze(-1)


class NoStatistic:
    """Takes no bytes and predicts nothing: enough for widths that do not depend on attention."""

    bytes_per_token = 0
    every = 2**30
    reduction: Reduction = "max"

    def prompt(self, layers: int, heads: int, total: int, queries: int, device: torch.device) -> NoObserver:
        return NoObserver(torch.zeros(layers, heads, total, 0, dtype=torch.uint8, device=device))

    def update(self, state: torch.Tensor, observed: torch.Tensor, position: int) -> None:
        pass

    def importance(self, state: torch.Tensor) -> torch.Tensor:
        return torch.zeros(state.shape[:-1], device=state.device)


class NoObserver:
    """Takes in nothing; gives the state that it was made with."""

    reads_from = 2**62

    def __init__(self, state: torch.Tensor) -> None:
        self._state = state

    def __call__(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        pass

    def state(self) -> torch.Tensor:
        return self._state
