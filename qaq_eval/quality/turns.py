"""Turns: one session of many, each a new piece of prompt and a decode, because one turn hides drift.

The first prompt is computed in full precision, as always. Every later one is computed by each configuration
itself and reads the cache that its earlier turns left, so that errors may pile up; full precision reads its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core import QAQCache
from qaq_eval.quality.documents import Document, cut
from qaq_eval.quality.prompt import CHUNK, FullPrecisionCache
from qaq_eval.quality.record import Measure, Part, Row, summarize
from qaq_eval.quality.run import Config, Progress, decode_step, prefilled


@dataclass(frozen=True)
class TurnRow(Row):
    """One configuration's turn, over all sessions. `context` is the length of a turn's prompt."""

    turn: int


def cut_sessions(
    text: str, tokenizer: Any, turns: int, context: int, decode: int, sessions: int, offset_fraction: float = 0.0
) -> list[Document]:
    """Documents of `turns` times a prompt of `context` tokens and a decode of `decode`."""
    return cut(text, tokenizer, turns * (context + decode) - decode, decode, sessions, offset_fraction)


def turn_rows(parts: Sequence[Part], configs: Sequence[str], context: int, turn: int) -> list[TurnRow]:
    """Rows of one turn, of its parts."""
    return [TurnRow(**vars(summarize(parts, config, context)), turn=turn) for config in configs]


@torch.no_grad()
def evaluate_turns(
    model: Any,
    fingerprint: str | None,
    sessions: Sequence[Document],
    turns: int,
    configs: Sequence[Config],
    done: Callable[[int, str, int], bool] = lambda index, config, turn: False,
    progress: Progress | None = None,
) -> Iterator[Part]:
    """What each configuration made of each session, a part a turn, as sessions end.

    Args:
        sessions: see `cut_sessions`.
        done: tells whether a session's last turn under a configuration is known.
    """
    methods = {config.text: config.method(model, fingerprint) for config in configs}
    report = progress or (lambda what, share: None)
    for i, session in enumerate(sessions):
        pending = {text: method for text, method in methods.items() if not done(session.index, text, turns)}
        if not pending:
            continue
        decode = session.decode
        context = (session.context + decode) // turns - decode
        any_method = next(iter(pending.values()))
        windows = [method.statistic for method in pending.values()]
        baseline = FullPrecisionCache(model, any_method, session.ids[:context], windows, len(session.ids) - 1 - context)
        sequences = prefilled(context, baseline.computed(torch.empty(0)), pending)
        parts = []
        for turn in range(1, turns + 1):
            start = (turn - 1) * (context + decode)
            report(f"session {i + 1} of {len(sessions)}: turn {turn}", (i + (turn - 1) / turns) / len(sessions))
            if turn > 1:
                baseline.append(session.ids[start : start + context])
                _append(model, session.ids[start : start + context], list(sequences.values()))
            at = start + context
            exact = baseline.extend(session.ids[at : at + decode])
            measures = [Measure(session.index, text, sequence, turn) for text, sequence in sequences.items()]
            for step in range(decode):
                decode_step(model, session.ids, at + step, exact[step], measures)
            parts += [measure.part() for measure in measures]
        for sequence in sequences.values():
            sequence.close()
        yield from parts
    report("done", 1.0)


def _append(model: Any, ids: torch.Tensor, sequences: Sequence[Any]) -> None:
    """Every sequence computes the next prompt from its own cache."""
    for sequence in sequences:
        sequence.expect_prompt(len(ids))
    for chunk in ids.split(CHUNK):
        start = sequences[0].length
        model(
            input_ids=chunk.to(model.device).expand(len(sequences), -1),
            position_ids=torch.arange(start, start + len(chunk), device=model.device).expand(len(sequences), -1),
            past_key_values=QAQCache(sequences),
            logits_to_keep=1,
        )
