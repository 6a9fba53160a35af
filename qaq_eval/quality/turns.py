"""Turns: sessions of many turns, each with a new prompt and a decode, because one turn hides accumulated error.

The first prompt is computed in full precision, as in every evaluation. Each configuration computes the later prompts
itself over the cache that its earlier turns left, so that errors may accumulate. Full precision uses its own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qaq_eval.quality.config import Config
from qaq_eval.quality.documents import Document, cut_documents
from qaq_eval.quality.prompt import FullPrecisionCache
from qaq_eval.quality.record import DocumentResult, EvalResult, Measurement, summarize
from qaq_eval.quality.run import Progress, append_prompt, decode_step, start_sequences, with_residual_window


@dataclass(frozen=True)
class TurnResult(EvalResult):
    """One turn of a configuration over all sessions. `context` is the length of a turn's prompt."""

    turn: int


def cut_sessions(
    text: str, tokenizer: Any, turns: int, context: int, decode: int, sessions: int, offset_fraction: float = 0.0
) -> list[Document]:
    """Documents of `turns` prompts of `context` tokens, each followed by `decode` decoded tokens."""
    return cut_documents(text, tokenizer, turns * (context + decode) - decode, decode, sessions, offset_fraction)


def summarize_turn(
    results: Sequence[DocumentResult], configs: Sequence[str], context: int, turn: int
) -> list[TurnResult]:
    """The summary of each configuration's turn, from the results of that turn."""
    return [TurnResult(**vars(summarize(results, config, context)), turn=turn) for config in configs]


@torch.no_grad()
def evaluate_turns(
    model: Any,
    fingerprint: str | None,
    sessions: Sequence[Document],
    turns: int,
    configs: Sequence[Config],
    done: Callable[[int, str, int], bool] = lambda index, config, turn: False,
    progress: Progress | None = None,
    window: int | None = None,
) -> Iterator[DocumentResult]:
    """One result for each session, configuration and turn, as sessions end.

    Args:
        sessions: see `cut_sessions`.
        done: whether the result of a session's turn under a configuration is known already.
        window: see `evaluate`.
    """
    methods = {config.text: with_residual_window(config.method(model, fingerprint), window) for config in configs}
    report = progress or (lambda stage, share: None)
    for i, session in enumerate(sessions):
        pending = {text: method for text, method in methods.items() if not done(session.index, text, turns)}
        if not pending:
            continue
        decode = session.decode
        context = (session.context + decode) // turns - decode
        any_method = next(iter(pending.values()))
        statistics = [method.statistic for method in pending.values()]
        room = len(session.ids) - 1 - context
        full = FullPrecisionCache(model, any_method, session.ids[:context], statistics, room)
        sequences = start_sequences(
            context, full.prefill(torch.empty(0)), pending, {config.text: config.originals for config in configs}
        )
        results = []
        for turn in range(1, turns + 1):
            start = (turn - 1) * (context + decode)
            report(f"session {i + 1} of {len(sessions)}: turn {turn}", (i + (turn - 1) / turns) / len(sessions))
            if turn > 1:
                full.append(session.ids[start : start + context])
                append_prompt(model, session.ids[start : start + context], list(sequences.values()))
            at = start + context
            expected = full.extend(session.ids[at : at + decode])
            measurements = [Measurement(session.index, text, sequence, turn) for text, sequence in sequences.items()]
            for step in range(decode):
                decode_step(model, session.ids, at + step, expected[step], measurements)
            results += [measurement.result() for measurement in measurements]
        for sequence in sequences.values():
            sequence.close()
        yield from results
    report("done", 1.0)
