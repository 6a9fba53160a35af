"""Runs documents through configurations: one prefill, then the decode of all configurations side by side.

The decode is the real one: one token per forward pass, over `SequenceCache`s that pack tokens, review exceptions and
fetch originals as they do in serving. It is teacher-forced: every configuration reads the same tokens, so each
predicted distribution can be compared with that of full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from qaq_core import InProcessOriginals, Method, QAQCache, SequenceCache
from qaq_core.base.errors import ConfigError
from qaq_core.storage import HeldValues
from qaq_eval.quality.config import Config
from qaq_eval.quality.documents import Document
from qaq_eval.quality.prompt import CHUNK, FullPrecisionCache, Prefill
from qaq_eval.quality.record import DocumentResult, Measurement

Progress = Callable[[str, float], None]


@torch.no_grad()
def evaluate(
    model: Any,
    fingerprint: str | None,
    documents: Sequence[Document],
    configs: Sequence[Config],
    done: Callable[[int, str], bool] = lambda index, config: False,
    progress: Progress | None = None,
    window: int | None = None,
) -> Iterator[DocumentResult]:
    """The result of each document under each configuration, as soon as it is known.

    Args:
        window: recent tokens that no configuration packs, see `with_residual_window`.
        done: whether the result of a document's index and a configuration is known already.
        progress: called with the current stage and the share of all work that is done.
    Raises:
        ConfigError, UnsupportedModelError.
    """
    methods = {config.text: with_residual_window(config.method(model, fingerprint), window) for config in configs}
    held = {config.text: config.originals for config in configs}
    report = progress or (lambda stage, share: None)
    total = len(documents)
    for i, document in enumerate(documents):
        pending = {text: method for text, method in methods.items() if not done(document.index, text)}
        if not pending:
            continue
        report(f"document {i + 1} of {total}: prompt", i / total)
        any_method = next(iter(pending.values()))
        statistics = [method.statistic for method in pending.values()]
        full = FullPrecisionCache(model, any_method, document.ids[: document.context], statistics, document.decode)
        sequences = start_sequences(document.context, full.prefill(torch.empty(0)), pending, held)
        measurements = [Measurement(document.index, text, sequence) for text, sequence in sequences.items()]
        expected = iter(torch.empty(0))
        for step in range(document.decode):
            at = document.context + step
            if step % CHUNK == 0:  # predictions of a long decode would not fit in memory
                expected = iter(full.extend(document.ids[at:-1][:CHUNK]))
            if step % 8 == 0:
                report(f"document {i + 1} of {total}: decode", (i + step / document.decode) / total)
            decode_step(model, document.ids, at, next(expected), measurements)
        for measurement in measurements:
            yield measurement.result()
            measurement.sequence.close()
    report("done", 1.0)


def with_residual_window(method: Method, tokens: int | None) -> Method:
    """The method with a residual window of `tokens` recent tokens (up to twice as many in decode), or its own if None.

    Raises:
        ConfigError: there is no such window, or the method packs other groups of tokens.
    """
    if tokens is None:
        return method
    if tokens < 1:
        raise ConfigError(f"the residual window must be at least 1 token, not {tokens}")
    return replace(method, pack_tokens=tokens)


_Key = TypeVar("_Key", bound=Hashable)


def start_sequences(
    context: int, prefill: Prefill, methods: Mapping[_Key, Method], held: Mapping[_Key, HeldValues] | None = None
) -> dict[_Key, SequenceCache]:
    """A sequence of each method, by key, whose prompt has just ended. They share the prompt's originals.

    Args:
        held: how a method's originals are held, if not exactly.
    """
    stores: dict[HeldValues, InProcessOriginals] = {}
    sequences = {}
    for key, method in methods.items():
        shared = context // method.page_tokens

        def name(page: int, key: _Key = key, shared: int = shared) -> bytes:
            return f"{page} {'prompt' if page < shared else key}".encode()

        values = (held or {}).get(key, "exact")
        if values not in stores:
            stores[values] = InProcessOriginals(values)
        sequences[key] = method.sequence(stores[values], name)
        sequences[key].load_prefill(prefill.originals, prefill.observer(method.statistic))
    return sequences


def append_prompt(model: Any, ids: torch.Tensor, sequences: Sequence[SequenceCache]) -> None:
    """Computes a further prompt with the cache of every sequence; all have the same length.

    Args:
        ids: int64 [n], the same for all, or [sequences, n].
    """
    each = ids.expand(len(sequences), -1).to(model.device)
    for sequence in sequences:
        sequence.expect_prompt(each.shape[1])
    for chunk in each.split(CHUNK, 1):
        start = sequences[0].length
        cache = QAQCache(sequences)
        model(
            input_ids=chunk,
            position_ids=torch.arange(start, start + chunk.shape[1], device=model.device).expand(len(sequences), -1),
            past_key_values=cache,
            logits_to_keep=1,
            qaq_cache=cache,
        )


def next_logits(model: Any, ids: torch.Tensor, sequences: Sequence[SequenceCache]) -> torch.Tensor:
    """Decodes one token of each sequence.

    Args:
        ids: int64 [sequences, 1].
    Returns:
        logits [sequences, vocabulary].
    """
    cache = QAQCache(sequences)
    logits: torch.Tensor = model(
        input_ids=ids.to(model.device),
        position_ids=torch.tensor([[sequence.length] for sequence in sequences], device=model.device),
        past_key_values=cache,
        qaq_cache=cache,
    ).logits[:, -1]
    return logits


def decode_step(
    model: Any, ids: torch.Tensor, at: int, full: torch.Tensor, measurements: Sequence[Measurement]
) -> None:
    """Decodes the token at position `at` with every sequence and measures the prediction of the next one.

    Args:
        full: log probabilities [vocabulary] of the next token in full precision.
    """
    tokens = ids[at].expand(len(measurements), 1)
    logits = next_logits(model, tokens, [measurement.sequence for measurement in measurements])
    for log_probabilities, measurement in zip(logits.float().log_softmax(-1), measurements, strict=True):
        measurement.add(full, log_probabilities, int(ids[at + 1]))
