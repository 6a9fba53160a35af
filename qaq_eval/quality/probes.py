"""Probes: a session that is asked several things, one after the other, and answers greedily from its own cache.

The first prompt is computed in full precision and quantized. Every question after it is a further prompt that each
configuration reads with its own cache, and answers read their own tokens. Full precision answers the same questions.
`late` makes the sessions: several needles at once, and formats that must still be kept late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core import Method, make_method
from qaq_core.storage import HeldValues
from qaq_eval.quality.choices import FULL_PRECISION
from qaq_eval.quality.config import Config
from qaq_eval.quality.prompt import FullPrecisionCache
from qaq_eval.quality.record import CacheBytes, fp16_token_bytes
from qaq_eval.quality.run import Progress, append_prompt, next_logits, start_sequences, with_residual_window


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        name: what is asked, for the results.
        ids: int64 [n], n > 1: text to read first, the question, and the beginning of its answer.
        expected: strings of a right answer.
        tokens: length of the answer.
    """

    name: str
    ids: torch.Tensor
    expected: tuple[str, ...]
    tokens: int

    def score(self, answer: str) -> float:
        """The share of expected strings that an answer has."""
        return sum(text in answer for text in self.expected) / len(self.expected)


@dataclass(frozen=True)
class Session:
    """A prompt, int64 [context], and what is asked after it."""

    trial: int
    prompt: torch.Tensor
    probes: tuple[Probe, ...]

    @property
    def length(self) -> int:
        """Tokens at the end."""
        return len(self.prompt) + sum(len(probe.ids) + probe.tokens for probe in self.probes)


@dataclass(frozen=True)
class ProbeAnswer:
    """The answer of one configuration to one probe.

    Attributes:
        position: tokens before the answer.
        score: share of expected strings.
        resident_bytes, fp16_bytes: of the cache before the answer.
    """

    trial: int
    order: int
    name: str
    config: str
    position: int
    answer: str
    score: float
    resident_bytes: int
    fp16_bytes: int


@dataclass(frozen=True)
class ProbeResult:
    """One configuration on the probe of one place in the order, over trials. Scores are means."""

    config: str
    order: int
    name: str
    position: int
    trials: int
    score: float
    score_fp16: float
    compression: float


@torch.no_grad()
def evaluate_probes(
    model: Any,
    fingerprint: str | None,
    tokenizer: Any,
    sessions: Sequence[Session],
    configs: Sequence[Config],
    done: Callable[[int, str], bool] = lambda trial, config: False,
    progress: Progress | None = None,
    window: int | None = None,
) -> Iterator[ProbeAnswer]:
    """The answers of each configuration, and of full precision, to all probes of each session, as sessions end.

    Args:
        done: whether the answers of a trial under a configuration are known already.
        window: see `run.evaluate`.
    """
    methods = {config.text: with_residual_window(config.method(model, fingerprint), window) for config in configs}
    originals = {config.text: config.originals for config in configs}
    any_method = next(iter(methods.values()), None) or make_method(model, fingerprint, "fp16")
    report = progress or (lambda stage, share: None)
    for i, session in enumerate(sessions):
        report(f"session {i + 1} of {len(sessions)}", i / len(sessions))
        pending = {text: method for text, method in methods.items() if not done(session.trial, text)}
        full_pending = not done(session.trial, FULL_PRECISION)
        if not pending and not full_pending:
            continue
        statistics = [method.statistic for method in pending.values()]
        room = session.length - len(session.prompt)
        full = FullPrecisionCache(model, any_method, session.prompt, statistics, room)
        if full_pending:
            yield from _full_answers(full, session, tokenizer, fp16_token_bytes(any_method))
            full.rewind()
        if pending:
            yield from _quantized_answers(model, full, session, tokenizer, pending, originals)
    report("done", 1.0)


def _full_answers(full: FullPrecisionCache, session: Session, tokenizer: Any, token: int) -> Iterator[ProbeAnswer]:
    for order, probe in enumerate(session.probes):
        full.append(probe.ids[:-1])
        size, ids = full.length * token, probe.ids[-1:]
        for _ in range(probe.tokens):
            ids = torch.cat([ids, full.extend(ids[-1:])[-1].argmax()[None].cpu()])
        full.append(ids[-1:])  # as in a session: the last token of an answer is read too
        text = tokenizer.decode(ids[1:].tolist())
        position = size // token + 1
        yield ProbeAnswer(
            session.trial, order, probe.name, FULL_PRECISION, position, text, probe.score(text), size, size
        )


def _quantized_answers(
    model: Any,
    full: FullPrecisionCache,
    session: Session,
    tokenizer: Any,
    methods: dict[str, Method],
    originals: dict[str, HeldValues],
) -> Iterator[ProbeAnswer]:
    held = start_sequences(len(session.prompt), full.prefill(torch.empty(0)), methods, originals)
    sequences = list(held.values())
    for order, probe in enumerate(session.probes):
        append_prompt(model, probe.ids[:-1], sequences)
        position = sequences[0].length + 1
        sizes = [CacheBytes.of(sequence) for sequence in sequences]
        ids = probe.ids[-1:].expand(len(sequences), 1).to(model.device)
        for _ in range(probe.tokens):
            ids = torch.cat([ids, next_logits(model, ids[:, -1:], sequences).argmax(-1, keepdim=True)], 1)
        next_logits(model, ids[:, -1:], sequences)
        for config, answer, size in zip(held, ids[:, 1:].tolist(), sizes, strict=True):
            text = tokenizer.decode(answer)
            yield ProbeAnswer(
                session.trial,
                order,
                probe.name,
                config,
                position,
                text,
                probe.score(text),
                size.resident,
                size.fp16,
            )
    for sequence in sequences:
        sequence.close()


def summarize_probes(answers: Sequence[ProbeAnswer], configs: Sequence[str]) -> list[ProbeResult]:
    """One result for each configuration and place in the order."""
    results = []
    for config in configs:
        for order in sorted({answer.order for answer in answers}):
            here = [answer for answer in answers if answer.order == order]
            own = [answer for answer in here if answer.config == config]
            full = [answer for answer in here if answer.config == FULL_PRECISION]
            names = list(dict.fromkeys(answer.name for answer in own))
            results.append(
                ProbeResult(
                    config=config,
                    order=order + 1,
                    name=", ".join(names),
                    position=round(sum(answer.position for answer in own) / len(own)),
                    trials=len(own),
                    score=sum(answer.score for answer in own) / len(own),
                    score_fp16=sum(answer.score for answer in full) / len(full),
                    compression=sum(a.fp16_bytes for a in own) / sum(a.resident_bytes for a in own),
                )
            )
    return results
