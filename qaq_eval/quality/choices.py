"""Multiple choice: how likely each answer to a question is from a cache that was quantized after the question.

The prompt without its last token is computed in full precision and quantized. Its last token and then the
answer's are decoded from that cache one at a time, so that every token of an answer, the first too, is predicted
from quantized keys and values. All answers branch from the same prompt, and all branches of all configurations
decode side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from blake3 import blake3

from qaq_core import Method, QAQCache, SequenceCache
from qaq_core.base.errors import ConfigError
from qaq_eval.quality.journal import Journal
from qaq_eval.quality.prompt import FullPrecisionCache
from qaq_eval.quality.record import held_bytes, token_bytes
from qaq_eval.quality.run import Config, prefilled

FULL = "full"
"""The configuration that is full precision."""

BRANCHES = 32
"""Answers that decode side by side, or a few more."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Answered:
    """One question under one configuration.

    Attributes:
        question: names the prompt and its answers.
        log_likelihoods: of each answer, in nats; greedy: whether it would have been decoded.
        tokens: of the prompt that was quantized.
        resident, plain: bytes that its cache held when the question had ended, and its bytes in fp16.
        packed_resident, packed_plain: the same without sinks and recent tokens.
    """

    question: str
    config: str
    log_likelihoods: list[float]
    greedy: list[bool]
    tokens: int
    resident: int
    plain: int
    packed_resident: int
    packed_plain: int


@dataclass(frozen=True)
class Question:
    """A prompt of at least 2 tokens and its answers of at least 1 each."""

    prompt: Tokens
    answers: tuple[Tokens, ...]

    @property
    def name(self) -> str:
        digest = blake3()
        for ids in (self.prompt, *self.answers):
            digest.update(torch.tensor([len(ids), *ids]).numpy().tobytes())
        return digest.hexdigest(16)

    @property
    def said(self) -> list[torch.Tensor]:
        """What is decoded for each answer: the prompt's last token, then the answer."""
        return [torch.tensor((self.prompt[-1], *answer)) for answer in self.answers]


@dataclass
class Branch:
    """One answer that is decoded from one configuration's cache."""

    question: str
    config: str
    ids: torch.Tensor
    sequence: SequenceCache
    rows: list[torch.Tensor] = field(default_factory=list)

    @property
    def goes_on(self) -> bool:
        return len(self.rows) < len(self.ids) - 1


class Examiner:
    """Answers questions with each configuration, and in full precision.

    Args:
        statistic: recent tokens that stay exact (up to twice as many while decoding); the methods' own if None.
        journal: keeps what has been answered.
    """

    def __init__(
        self,
        model: Any,
        fingerprint: str | None,
        configs: Sequence[Config],
        statistic: int | None,
        journal: Journal,
    ) -> None:
        self._model, self._journal = model, journal
        self._methods = {config.text: narrowed(config.method(model, fingerprint), statistic) for config in configs}
        self._known = {(a.question, a.config): a for a in journal.entries(Answered)}

    def answer(self, questions: Sequence[Question], progress: Callable[[float], None]) -> dict[str, list[Answered]]:
        """What every configuration makes of the questions, by its name, in their order."""
        names = (*self._methods, FULL)
        branches: list[Branch] = []
        for done, question in enumerate(questions):
            pending = [text for text in names if (question.name, text) not in self._known]
            branches += self._branches(question, pending)
            if len(branches) >= BRANCHES or done == len(questions) - 1:
                self._decode(branches)
                branches = []
            progress((done + 1) / len(questions))
        return {text: [self._known[question.name, text] for question in questions] for text in names}

    def _branches(self, question: Question, pending: Sequence[str]) -> list[Branch]:
        """Computes a prompt, answers it in full precision if that is pending, and quantizes it for the rest."""
        if not pending:
            return []
        methods = {text: self._methods[text] for text in pending if text != FULL}
        said, windows = question.said, [method.statistic for method in methods.values()]
        any_method = next(iter(self._methods.values()))
        prompt = torch.tensor(question.prompt[:-1])
        baseline = FullPrecisionCache(self._model, any_method, prompt, windows, max(map(len, said)))
        if FULL in pending:
            results = []
            for ids in said:
                results.append(_grade(baseline.extend(ids[:-1]), ids[1:]))
                baseline.rewind()
            plain = len(prompt) * token_bytes(any_method)
            self._keep(question.name, FULL, results, len(prompt), (plain, plain, 0, 0))
        each = {(text, i): method for text, method in methods.items() for i in range(len(said))}
        sequences = prefilled(len(prompt), baseline.computed(torch.empty(0)), each)
        return [Branch(question.name, text, said[i], sequence) for (text, i), sequence in sequences.items()]

    @torch.no_grad()
    def _decode(self, branches: Sequence[Branch]) -> None:
        """Decodes all branches to their ends and keeps what came out."""
        held = [(branch.sequence.length, held_bytes(branch.sequence)) for branch in branches]
        device = self._model.device
        while going := [branch for branch in branches if branch.goes_on]:
            logits = self._model(
                input_ids=torch.stack([b.ids[len(b.rows) : len(b.rows) + 1] for b in going]).to(device),
                position_ids=torch.tensor([[b.sequence.length] for b in going], device=device),
                past_key_values=QAQCache([b.sequence for b in going]),
            ).logits[:, -1]
            for branch, row in zip(going, logits.float().log_softmax(-1), strict=True):
                token = int(branch.ids[len(branch.rows) + 1])
                # Of a distribution only the token's likelihood and the most likely token are needed.
                branch.rows.append(torch.stack([row[token].double(), (row.argmax() == token).double()]))
        graded: dict[tuple[str, str], list[tuple[float, bool]]] = {}
        for branch in branches:
            likelihood, greedy = torch.stack(branch.rows).unbind(1)
            graded.setdefault((branch.question, branch.config), []).append(
                (float(likelihood.sum()), bool(greedy.all()))
            )
            branch.sequence.close()
        sizes = {(b.question, b.config): size for b, size in zip(branches, held, strict=True)}
        for (question, config), results in graded.items():
            self._keep(question, config, results, *sizes[question, config])

    def _keep(
        self,
        question: str,
        config: str,
        results: Sequence[tuple[float, bool]],
        tokens: int,
        held: tuple[int, int, int, int],
    ) -> None:
        likelihoods, greedy = [x for x, _ in results], [most for _, most in results]
        answered = Answered(question, config, likelihoods, greedy, tokens, *held)
        self._known[question, config] = answered
        self._journal.add(asdict(answered))


def narrowed(method: Method, statistic: int | None) -> Method:
    """The method with another recent window."""
    if statistic is None:
        return method
    if statistic < 1:
        raise ConfigError(f"the window must be at least 1 token, not {statistic}")
    return replace(method, pack_tokens=statistic)


def _grade(log_probabilities: torch.Tensor, truth: torch.Tensor) -> tuple[float, bool]:
    """Log likelihood of tokens, and whether each was the most likely one."""
    truth = truth.to(log_probabilities.device)
    likely = log_probabilities.gather(1, truth[:, None])
    return float(likely.double().sum()), bool((log_probabilities.argmax(-1) == truth).all())
