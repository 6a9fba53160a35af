"""Needle in a haystack: a code is hidden in a long text and asked for at its end.

The prompt is computed in full precision and quantized. The answer is decoded greedily from the quantized cache of each
configuration, which reads its own tokens. Full precision answers the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core import Method
from qaq_core.base.errors import ConfigError
from qaq_core.storage import HeldValues
from qaq_eval.quality.choices import FULL_PRECISION
from qaq_eval.quality.config import Config
from qaq_eval.quality.documents import bos_tokens
from qaq_eval.quality.prompt import FullPrecisionCache
from qaq_eval.quality.record import CacheBytes, fp16_token_bytes
from qaq_eval.quality.run import Progress, next_logits, start_sequences

DEPTHS = (10, 20, 30, 40, 50, 60, 70, 80, 90)
NEEDLE = "\n\nThe secret code is {code}. Remember it: the secret code is {code}.\n\n"
QUESTION = "\n\nWhat is the secret code? The secret code is"
ANSWER_TOKENS = 12
"""A code of 7 digits is at most 7 tokens and a space."""

MAX_BOUNDARY_DISTANCE = 100
"""How many tokens a needle may move to begin after a sentence or line."""


@dataclass(frozen=True)
class Haystack:
    """A prompt that hides a code.

    Attributes:
        ids: int64 [context], the question last.
        depth: percent of the text before the needle.
    """

    trial: int
    depth: int
    code: str
    ids: torch.Tensor


@dataclass(frozen=True)
class NeedleAnswer:
    """The answer of one configuration. Bytes are those after the prompt."""

    trial: int
    depth: int
    config: str
    answer: str
    found: bool
    resident_bytes: int
    fp16_bytes: int


@dataclass(frozen=True)
class NeedleResult:
    """One configuration at one depth. `found` and `found_fp16` are shares of trials."""

    config: str
    context: int
    depth: int
    trials: int
    found: float
    found_fp16: float
    compression: float


def make_haystacks(
    text: str, tokenizer: Any, context: int, trials: int, offset_fraction: float = 0.0, seed: int = 0
) -> list[Haystack]:
    """A haystack for each trial and depth. Trials differ in text and code; all depths of a trial share the text.

    Raises:
        ConfigError: the text or the context is too short.
    """

    def encode(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        return ids

    begin = bos_tokens(tokenizer)
    source = encode(text)
    source = source[int(len(source) * offset_fraction) :]
    rng, question = random.Random(seed), encode(QUESTION)
    haystacks, at = [], 0
    for trial in range(trials):
        code = f"{rng.randrange(10**6, 10**7)}"
        needle = encode(NEEDLE.format(code=code))
        room = context - len(begin) - len(needle) - len(question)
        if room < 2 * MAX_BOUNDARY_DISTANCE:
            raise ConfigError(f"a context of {context} tokens is too short for a needle: take at least 400")
        hay = source[at : at + room]
        if len(hay) < room:
            raise ConfigError(f"the text ends in trial {trial + 1}: take a longer text, or fewer trials")
        at += room
        for depth in DEPTHS:
            split = boundary(hay, room * depth // 100, tokenizer)
            ids = [*begin, *hay[:split], *needle, *hay[split:], *question]
            haystacks.append(Haystack(trial, depth, code, torch.tensor(ids)))
    return haystacks


def boundary(ids: list[int], at: int, tokenizer: Any) -> int:
    """The next end of a sentence or line, or `at` if none is near."""
    for end in range(at, min(at + MAX_BOUNDARY_DISTANCE, len(ids))):
        if tokenizer.decode(ids[end - 1 : end]).rstrip(" ").endswith((".", "\n")):
            return end
    return at


@torch.no_grad()
def evaluate_needles(
    model: Any,
    fingerprint: str | None,
    tokenizer: Any,
    haystacks: Sequence[Haystack],
    configs: Sequence[Config],
    done: Callable[[Haystack, str], bool] = lambda haystack, config: False,
    progress: Progress | None = None,
) -> Iterator[NeedleAnswer]:
    """The answer of each configuration, and of full precision, to each haystack."""
    methods = {config.text: config.method(model, fingerprint) for config in configs}
    held = {config.text: config.originals for config in configs}
    any_method = next(iter(methods.values()))
    report = progress or (lambda stage, share: None)
    for i, haystack in enumerate(haystacks):
        report(f"needle {i + 1} of {len(haystacks)}", i / len(haystacks))
        pending = {text: method for text, method in methods.items() if not done(haystack, text)}
        full_pending = not done(haystack, FULL_PRECISION)
        if not pending and not full_pending:
            continue
        prompt, last = haystack.ids[:-1], haystack.ids[-1:]
        statistics = [method.statistic for method in pending.values()]
        full = FullPrecisionCache(model, any_method, prompt, statistics, ANSWER_TOKENS)
        answers: dict[str, tuple[list[int], int, int]] = {}
        if full_pending:
            size = len(prompt) * fp16_token_bytes(any_method)
            answers[FULL_PRECISION] = (_full_answer(full, last), size, size)
            full.rewind()
        if pending:
            answers |= _quantized_answers(model, full, len(prompt), last, pending, held)
        for config, (ids, resident, fp16) in answers.items():
            text = tokenizer.decode(ids)
            yield NeedleAnswer(haystack.trial, haystack.depth, config, text, haystack.code in text, resident, fp16)
    report("done", 1.0)


def _full_answer(full: FullPrecisionCache, last: torch.Tensor) -> list[int]:
    """The tokens that full precision decodes after the prompt's last token, int64 [1]."""
    ids = last
    for _ in range(ANSWER_TOKENS):
        ids = torch.cat([ids, full.extend(ids[-1:])[-1].argmax()[None].cpu()])
    answer: list[int] = ids[1:].tolist()
    return answer


def _quantized_answers(
    model: Any,
    full: FullPrecisionCache,
    context: int,
    last: torch.Tensor,
    methods: dict[str, Method],
    held: dict[str, HeldValues],
) -> dict[str, tuple[list[int], int, int]]:
    """The tokens that each method decodes, and its cache's bytes after the prompt, and those of fp16."""
    sequences = start_sequences(context, full.prefill(torch.empty(0)), methods, held)
    sizes = [CacheBytes.of(sequence) for sequence in sequences.values()]
    ids = last.expand(len(sequences), 1).to(model.device)
    for _ in range(ANSWER_TOKENS):
        logits = next_logits(model, ids[:, -1:], list(sequences.values()))
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    for sequence in sequences.values():
        sequence.close()
    answers = zip(sequences, ids[:, 1:].tolist(), sizes, strict=True)
    return {config: (answer, size.resident, size.fp16) for config, answer, size in answers}


def summarize_needles(answers: Sequence[NeedleAnswer], configs: Sequence[str], context: int) -> list[NeedleResult]:
    """One result for each configuration and depth."""
    results = []
    for config in configs:
        for depth in sorted({answer.depth for answer in answers}):
            here = [answer for answer in answers if answer.depth == depth]
            own = [answer for answer in here if answer.config == config]
            full = [answer for answer in here if answer.config == FULL_PRECISION]
            results.append(
                NeedleResult(
                    config=config,
                    context=context,
                    depth=depth,
                    trials=len(own),
                    found=sum(answer.found for answer in own) / len(own),
                    found_fp16=sum(answer.found for answer in full) / len(full),
                    compression=sum(a.fp16_bytes for a in own) / sum(a.resident_bytes for a in own),
                )
            )
    return results
