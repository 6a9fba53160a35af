"""Prefill in full precision: the reference, and the start of every configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core import Method, QAQCache
from qaq_core.allocation import AttentionStatistic, LayerObserver, Observer, PromptMeans, PromptObserver
from qaq_core.attention import LayerInput, LayerTokens
from qaq_core.base.pages import KEY, VALUE
from qaq_eval.quality.documents import Document

CHUNK = 512


@dataclass(frozen=True)
class Prefill:
    """A prompt, and the predictions after it, in full precision.

    Attributes:
        originals: [layers, 2, kv_heads, context, head_dim], keys and values of the prompt.
        log_probabilities: float32 [decode, vocabulary], after each decoded token.
        observers: what each attention statistic observed of the prompt, by `statistic_key`.
    """

    originals: torch.Tensor
    log_probabilities: torch.Tensor
    observers: dict[str, PromptObserver]

    def observer(self, statistic: AttentionStatistic) -> PromptObserver:
        """A copy of what the statistic observed of the prompt."""
        return _FinishedObserver(self.observers[statistic_key(statistic)].state().clone())


class _FinishedObserver:
    """An observer whose prompt has ended."""

    reads_from = 0

    def __init__(self, state: torch.Tensor) -> None:
        self._state = state

    def __call__(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        raise AssertionError("the prompt has ended")

    def state(self) -> torch.Tensor:
        return self._state


class FullPrecisionCache:
    """A sequence in full precision whose prompt is observed by attention statistics; for `QAQCache` a sequence.

    Args:
        prompt: int64 [n].
        room: tokens that may follow the prompt.
    """

    batched = False

    def __init__(
        self, model: Any, method: Method, prompt: torch.Tensor, statistics: Iterable[AttentionStatistic], room: int
    ) -> None:
        shape, self._context = method.shape, len(prompt)
        self.method, self.length, self._incoming, self._model = method, 0, 0, model
        dims = (shape.layers, 2, shape.kv_heads, len(prompt) + room, shape.head_dim)
        self._rows = torch.empty(dims, dtype=method.dtype, device=method.device)
        self._observers = {
            statistic_key(statistic): statistic.prompt(
                shape.layers, shape.kv_heads, self._context, self._context, method.device
            )
            for statistic in statistics
        }
        for first in range(0, self._context, CHUNK):
            self._forward(prompt[first : first + CHUNK], keep=1)

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Appends tokens. Returns log probabilities float32 [n, vocabulary] after each."""
        logits = [self._forward(ids[first : first + CHUNK], keep=CHUNK) for first in range(0, len(ids), CHUNK)]
        return torch.cat(logits).float().log_softmax(-1)

    def append(self, ids: torch.Tensor) -> None:
        """Appends tokens without their predictions."""
        for first in range(0, len(ids), CHUNK):
            self._forward(ids[first : first + CHUNK], keep=1)

    def rewind(self) -> None:
        """Removes the tokens after the prompt."""
        self.length = self._context

    def prefill(self, log_probabilities: torch.Tensor) -> Prefill:
        """The prompt with the predictions after it."""
        return Prefill(self._rows[:, :, :, : self._context], log_probabilities, self._observers)

    def attend(self, given: LayerInput) -> torch.Tensor:
        layer, query, keys, values, scaling, sliding_window = given
        start, stop = self.length, self.length + keys.shape[1]
        self._incoming = keys.shape[1]
        self._rows[layer, KEY, :, start:stop] = keys
        self._rows[layer, VALUE, :, start:stop] = values
        tokens = LayerTokens(layer, self._rows[layer, KEY, :, :stop], self._rows[layer, VALUE, :, :stop], 0, None)
        attention, out = self.method.attention, None
        for unread, observer in self._watch(layer) if stop <= self._context else ():
            if unread < query.shape[1]:
                seen = attention(query[:, unread:], tokens, scaling, sliding_window, observer)
                out = out if unread else seen
        return attention(query, tokens, scaling, sliding_window) if out is None else out

    def _watch(self, layer: int) -> Iterator[tuple[int, Observer]]:
        """The observers of a layer's next queries, and the first of these that each reads."""
        start, others = self.length, []
        for observer in self._observers.values():
            if isinstance(observer, PromptMeans):  # a kernel fills it in
                yield 0, LayerObserver(observer, layer, start)
            else:
                others.append(observer)
        if others:
            unread = max(0, min(observer.reads_from for observer in others) - start)

            def observe(probabilities: torch.Tensor, first: int) -> None:
                for observer in others:
                    observer(layer, probabilities, start + unread + first)

            yield unread, observe

    def commit(self) -> None:
        self.length += self._incoming

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        device = self.method.device
        cache = QAQCache([self], self.method)  # type: ignore[list-item]
        logits: torch.Tensor = self._model(
            input_ids=ids[None].to(device),
            position_ids=torch.arange(self.length, self.length + len(ids), device=device)[None],
            past_key_values=cache,
            logits_to_keep=keep,
            qaq_cache=cache,
        ).logits[0]
        return logits


def full_precision(model: Any, method: Method, document: Document, statistics: Iterable[AttentionStatistic]) -> Prefill:
    """Runs a document through the model once, without quantization."""
    cache = FullPrecisionCache(model, method, document.ids[: document.context], statistics, document.decode)
    return cache.prefill(cache.extend(document.ids[document.context : -1]))


def statistic_key(statistic: AttentionStatistic) -> str:
    """A key that equal statistics share."""
    return f"{type(statistic).__name__} {sorted(vars(statistic).items())}"
