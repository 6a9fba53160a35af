"""A prompt in full precision: the baseline, and what all configurations start from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core import Method, QAQCache
from qaq_core.allocation import AttentionStatistic, PromptObserver
from qaq_core.attention import LayerInput, LayerTokens
from qaq_core.base.pages import KEY, VALUE
from qaq_eval.quality.documents import Document

CHUNK = 512


@dataclass(frozen=True)
class Computed:
    """What full precision makes of a document.

    Attributes:
        originals: [layers, 2, kv_heads, context, head_dim], keys and values of the prompt.
        log_probabilities: float32 [decode, vocabulary], of the token after each that is decoded.
    """

    originals: torch.Tensor
    log_probabilities: torch.Tensor
    watches: dict[str, PromptObserver]

    def watch(self, statistic: AttentionStatistic) -> PromptObserver:
        """What that window saw of the prompt; a copy."""
        return _Seen(self.watches[window_key(statistic)].state().clone())


class _Seen:
    """A watch whose prompt has ended."""

    def __init__(self, state: torch.Tensor) -> None:
        self._state = state

    def __call__(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        raise AssertionError("the prompt has ended")

    def state(self) -> torch.Tensor:
        return self._state


class FullPrecisionCache:
    """A sequence in full precision, its prompt watched by windows; to `QAQCache` a sequence like any other.

    Args:
        prompt: int64 [n].
        room: tokens that may follow the prompt.
    """

    batched = False

    def __init__(
        self, model: Any, method: Method, prompt: torch.Tensor, windows: Iterable[AttentionStatistic], room: int
    ) -> None:
        shape, self._context = method.shape, len(prompt)
        self.method, self.length, self._incoming, self._model = method, 0, 0, model
        dims = (shape.layers, 2, shape.kv_heads, len(prompt) + room, shape.head_dim)
        self._rows = torch.empty(dims, dtype=method.dtype, device=method.device)
        self._watches = {
            window_key(statistic): statistic.prompt(
                shape.layers, shape.kv_heads, self._context, self._context, method.device
            )
            for statistic in windows
        }
        for first in range(0, self._context, CHUNK):
            self._forward(prompt[first : first + CHUNK], keep=1)

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Takes in the next tokens; log probabilities float32 [n, vocabulary] of the token after each."""
        parts = [self._forward(ids[first : first + CHUNK], keep=CHUNK) for first in range(0, len(ids), CHUNK)]
        return torch.cat(parts).float().log_softmax(-1)

    def append(self, ids: torch.Tensor) -> None:
        """Takes in the next tokens; what they predict is not asked for."""
        for first in range(0, len(ids), CHUNK):
            self._forward(ids[first : first + CHUNK], keep=1)

    def rewind(self) -> None:
        """Forgets what followed the prompt."""
        self.length = self._context

    def computed(self, log_probabilities: torch.Tensor) -> Computed:
        """The prompt, and what has been predicted after it."""
        return Computed(self._rows[:, :, :, : self._context], log_probabilities, self._watches)

    def attend(self, given: LayerInput) -> torch.Tensor:
        layer, query, keys, values, scaling, sliding_window = given
        held, stop = self.length, self.length + keys.shape[1]
        self._incoming = keys.shape[1]
        self._rows[layer, KEY, :, held:stop] = keys
        self._rows[layer, VALUE, :, held:stop] = values
        tokens = LayerTokens(layer, self._rows[layer, KEY, :, :stop], self._rows[layer, VALUE, :, :stop], 0, None)

        def observe(probabilities: torch.Tensor, first: int) -> None:
            for watch in self._watches.values():
                watch(layer, probabilities, held + first)

        watching = observe if stop <= self._context else None
        return self.method.attention(query, tokens, scaling, sliding_window, watching)

    def commit(self) -> None:
        self.length += self._incoming

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        device = self.method.device
        logits: torch.Tensor = self._model(
            input_ids=ids[None].to(device),
            position_ids=torch.arange(self.length, self.length + len(ids), device=device)[None],
            past_key_values=QAQCache([self], self.method),  # type: ignore[list-item]
            logits_to_keep=keep,
        ).logits[0]
        return logits


def compute(model: Any, method: Method, document: Document, windows: Iterable[AttentionStatistic]) -> Computed:
    """Runs a document through the model, once, with nothing quantized."""
    baseline = FullPrecisionCache(model, method, document.ids[: document.context], windows, document.decode)
    return baseline.computed(baseline.extend(document.ids[document.context : -1]))


def window_key(statistic: AttentionStatistic) -> str:
    """Windows with the same key see the same."""
    return f"{type(statistic).__name__} {sorted(vars(statistic).items())}"
