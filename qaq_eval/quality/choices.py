"""Multiple choice: the likelihood of each answer to a question, from a cache quantized after the question.

The prompt without its last token is computed in full precision and quantized. The last token and the answer are then
decoded from that cache one by one, so that every token of an answer is predicted from quantized keys and values. Each
answer has a sequence of its own that starts from the same prompt. The sequences of all configurations decode side by
side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from blake3 import blake3

from qaq_core import SequenceCache
from qaq_eval.quality.config import Config
from qaq_eval.quality.journal import Journal
from qaq_eval.quality.prompt import FullPrecisionCache
from qaq_eval.quality.record import CacheBytes, fp16_token_bytes
from qaq_eval.quality.run import next_logits, start_sequences, with_residual_window

FULL_PRECISION = "full"
"""The name of the configuration without quantization."""

BATCH = 32
"""Answers that decode side by side, or a few more."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class QuestionResult:
    """One question under one configuration.

    Attributes:
        question: a hash of the prompt and its answers.
        log_likelihoods: of each answer, in nats.
        greedy: whether greedy decoding gives the answer, for each answer.
        tokens: length of the quantized prompt.
        resident_bytes, fp16_bytes: bytes of its cache after the question, and of the same tokens in fp16.
        packed_bytes, packed_fp16_bytes: the same without the residual window.
    """

    question: str
    config: str
    log_likelihoods: list[float]
    greedy: list[bool]
    tokens: int
    resident_bytes: int
    fp16_bytes: int
    packed_bytes: int
    packed_fp16_bytes: int


@dataclass(frozen=True)
class Question:
    """A prompt of at least 2 tokens and its answers of at least 1 token each."""

    prompt: Tokens
    answers: tuple[Tokens, ...]

    @property
    def name(self) -> str:
        digest = blake3()
        for ids in (self.prompt, *self.answers):
            digest.update(torch.tensor([len(ids), *ids]).numpy().tobytes())
        return digest.hexdigest(16)

    @property
    def decoded(self) -> list[torch.Tensor]:
        """The tokens decoded for each answer: the prompt's last token, then the answer."""
        return [torch.tensor((self.prompt[-1], *answer)) for answer in self.answers]


@dataclass
class AnswerSequence:
    """One answer that is decoded from one configuration's cache.

    Attributes:
        scores: for each answer token so far, float64 [2]: its log likelihood, and 1 if it is the most likely token.
    """

    question: str
    config: str
    ids: torch.Tensor
    sequence: SequenceCache
    scores: list[torch.Tensor] = field(default_factory=list)

    @property
    def unfinished(self) -> bool:
        return len(self.scores) < len(self.ids) - 1


class ChoiceEvaluator:
    """Answers questions with each configuration and in full precision.

    Args:
        residual_window: recent tokens that are not packed (up to twice as many in decode); the methods' own if None.
        journal: keeps finished results.
    """

    def __init__(
        self,
        model: Any,
        fingerprint: str | None,
        configs: Sequence[Config],
        residual_window: int | None,
        journal: Journal,
    ) -> None:
        self._model, self._journal = model, journal
        self._methods = {
            config.text: with_residual_window(config.method(model, fingerprint), residual_window) for config in configs
        }
        self._held = {config.text: config.originals for config in configs}
        self._results = {(r.question, r.config): r for r in journal.entries(QuestionResult)}

    def answer(
        self, questions: Sequence[Question], progress: Callable[[float], None]
    ) -> dict[str, list[QuestionResult]]:
        """The results of every configuration, by its name, in the order of the questions."""
        names = (*self._methods, FULL_PRECISION)
        batch: list[AnswerSequence] = []
        for done, question in enumerate(questions):
            pending = [text for text in names if (question.name, text) not in self._results]
            batch += self._start(question, pending)
            if len(batch) >= BATCH or done == len(questions) - 1:
                self._decode(batch)
                batch = []
            progress((done + 1) / len(questions))
        return {text: [self._results[question.name, text] for question in questions] for text in names}

    def _start(self, question: Question, pending: Sequence[str]) -> list[AnswerSequence]:
        """Computes a prompt, answers it in full precision if that is pending, and quantizes it for the others."""
        if not pending:
            return []
        methods = {text: self._methods[text] for text in pending if text != FULL_PRECISION}
        decoded, statistics = question.decoded, [method.statistic for method in methods.values()]
        any_method = next(iter(self._methods.values()))
        prompt = torch.tensor(question.prompt[:-1])
        full = FullPrecisionCache(self._model, any_method, prompt, statistics, max(map(len, decoded)))
        if FULL_PRECISION in pending:
            scores = []
            for ids in decoded:
                scores.append(_score(full.extend(ids[:-1]), ids[1:]))
                full.rewind()
            fp16 = len(prompt) * fp16_token_bytes(any_method)
            self._add(question.name, FULL_PRECISION, scores, len(prompt), CacheBytes(fp16, fp16, 0, 0))
        keys = {(text, i): method for text, method in methods.items() for i in range(len(decoded))}
        held = {key: self._held[key[0]] for key in keys}
        sequences = start_sequences(len(prompt), full.prefill(torch.empty(0)), keys, held)
        return [AnswerSequence(question.name, text, decoded[i], seq) for (text, i), seq in sequences.items()]

    @torch.no_grad()
    def _decode(self, batch: Sequence[AnswerSequence]) -> None:
        """Decodes all answers to their ends and adds the results."""
        start = {(a.question, a.config): (a.sequence.length, CacheBytes.of(a.sequence)) for a in batch}
        while unfinished := [answer for answer in batch if answer.unfinished]:
            ids = torch.stack([a.ids[len(a.scores) : len(a.scores) + 1] for a in unfinished])
            logits = next_logits(self._model, ids, [answer.sequence for answer in unfinished])
            for answer, row in zip(unfinished, logits.float().log_softmax(-1), strict=True):
                token = int(answer.ids[len(answer.scores) + 1])
                answer.scores.append(torch.stack([row[token].double(), (row.argmax() == token).double()]))
        scores: dict[tuple[str, str], list[tuple[float, bool]]] = {}
        for answer in batch:
            likelihood, greedy = torch.stack(answer.scores).unbind(1)
            scores.setdefault((answer.question, answer.config), []).append(
                (float(likelihood.sum()), bool(greedy.all()))
            )
            answer.sequence.close()
        for (question, config), answers in scores.items():
            self._add(question, config, answers, *start[question, config])

    def _add(
        self, question: str, config: str, scores: Sequence[tuple[float, bool]], tokens: int, size: CacheBytes
    ) -> None:
        likelihoods, greedy = [likelihood for likelihood, _ in scores], [most_likely for _, most_likely in scores]
        result = QuestionResult(
            question,
            config,
            likelihoods,
            greedy,
            tokens,
            resident_bytes=size.resident,
            fp16_bytes=size.fp16,
            packed_bytes=size.packed,
            packed_fp16_bytes=size.packed_fp16,
        )
        self._results[question, config] = result
        self._journal.add(asdict(result))


def _score(log_probabilities: torch.Tensor, answer: torch.Tensor) -> tuple[float, bool]:
    """Log likelihood of an answer's tokens, and whether each was the most likely one."""
    answer = answer.to(log_probabilities.device)
    likelihoods = log_probabilities.gather(1, answer[:, None])
    return float(likelihoods.double().sum()), bool((log_probabilities.argmax(-1) == answer).all())
