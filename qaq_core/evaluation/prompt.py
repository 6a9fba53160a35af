"""A document in full precision: the baseline, and the prompt that all configurations start from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core.attention.reference import LayerTokens
from qaq_core.cache import QAQCache
from qaq_core.evaluation.documents import Document
from qaq_core.method import Method
from qaq_core.pages import KEY, VALUE
from qaq_core.window import PromptWatch, Window

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
    watches: dict[str, PromptWatch]

    def watch(self, window: Window) -> PromptWatch:
        """What that window saw of the prompt; a copy."""
        return _Seen(self.watches[window_key(window)].state().clone())


class _Seen:
    """A watch whose prompt has ended."""

    def __init__(self, state: torch.Tensor) -> None:
        self._state = state

    def __call__(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        raise AssertionError("the prompt has ended")

    def state(self) -> torch.Tensor:
        return self._state


class _Recording:
    """A sequence in full precision that windows watch; to `QAQCache` it is a sequence like any other."""

    def __init__(self, method: Method, document: Document, windows: Iterable[Window]) -> None:
        shape, tokens = method.shape, len(document.ids) - 1
        self.method, self.length, self._context, self._arriving = method, 0, document.context, 0
        dims = (shape.layers, 2, shape.kv_heads, tokens, shape.head_dim)
        self.originals = torch.empty(dims, dtype=method.dtype, device=method.device)
        self.watches = {
            window_key(window): window.prompt(
                shape.layers, shape.kv_heads, document.context, document.context, method.device
            )
            for window in windows
        }

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        held, stop = self.length, self.length + keys.shape[1]
        self._arriving = keys.shape[1]
        self.originals[layer, KEY, :, held:stop] = keys
        self.originals[layer, VALUE, :, held:stop] = values
        tokens = LayerTokens(
            layer, self.originals[layer, KEY, :, :stop], self.originals[layer, VALUE, :, :stop], 0, None
        )

        def observe(probabilities: torch.Tensor, first: int) -> None:
            for watch in self.watches.values():
                watch(layer, probabilities, held + first)

        watching = observe if stop <= self._context else None
        return self.method.attention(query, tokens, scaling, sliding_window, watching)

    def commit(self) -> None:
        self.length += self._arriving


@torch.no_grad()
def compute(model: Any, method: Method, document: Document, windows: Iterable[Window]) -> Computed:
    """Runs a document through the model, once, with nothing quantized."""
    recording = _Recording(method, document, windows)
    cache = QAQCache([recording], method)  # type: ignore[list-item]
    ids = document.ids[None, :-1].to(method.device)
    ends = [*range(CHUNK, document.context, CHUNK), document.context, ids.shape[1]]
    logits, start = None, 0
    for end in ends:
        keep = end - start if end > document.context else 1
        logits = model(
            input_ids=ids[:, start:end],
            position_ids=torch.arange(start, end, device=method.device)[None],
            past_key_values=cache,
            logits_to_keep=keep,
        ).logits[0]
        start = end
    assert logits is not None
    return Computed(
        recording.originals[:, :, :, : document.context], logits.float().log_softmax(-1), recording.watches
    )


def window_key(window: Window) -> str:
    """Windows with the same key see the same."""
    return f"{type(window).__name__} {sorted(vars(window).items())}"
