"""Needles: a code is hidden in a long text, and asked for at its end.

The prompt is computed in full precision and quantized; the answer is decoded greedily from the quantized cache,
each configuration reading its own tokens. Full precision answers the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core import QAQCache
from qaq_core.base.errors import ConfigError
from qaq_eval.quality.choices import FULL
from qaq_eval.quality.prompt import FullPrecisionCache
from qaq_eval.quality.record import held_bytes, token_bytes
from qaq_eval.quality.run import Config, Progress, prefilled

DEPTHS = (10, 20, 30, 40, 50, 60, 70, 80, 90)
NEEDLE = "\n\nThe secret code is {code}. Remember it: the secret code is {code}.\n\n"
QUESTION = "\n\nWhat is the secret code? The secret code is"
ANSWER_TOKENS = 12
"""A code of 7 digits is at most 7 tokens, and a space."""

BOUNDARY_REACH = 100


@dataclass(frozen=True)
class Haystack:
    """A prompt that hides a code.

    Attributes:
        ids: int64 [context], the question last.
        depth: percent of the text that stands before the needle.
    """

    trial: int
    depth: int
    code: str
    ids: torch.Tensor


@dataclass(frozen=True)
class Found:
    """What one configuration answered. resident, plain: bytes when the prompt had ended."""

    trial: int
    depth: int
    config: str
    answer: str
    found: bool
    resident: int
    plain: int


@dataclass(frozen=True)
class NeedleRow:
    """One configuration at one depth: the share of trials in which the code was found."""

    config: str
    context: int
    depth: int
    trials: int
    found: float
    found_fp16: float
    compression: float


def hide(
    text: str, tokenizer: Any, context: int, trials: int, offset_fraction: float = 0.0, seed: int = 0
) -> list[Haystack]:
    """A haystack per trial and depth; trials have texts and codes of their own, depths of a trial share the text.

    Raises:
        ConfigError: the text is too short, or the context to hide anything in it.
    """

    def encode(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        return ids

    special = tokenizer("").input_ids
    begin = [special[0]] if special and special[0] == tokenizer.bos_token_id else []
    source = encode(text)
    source = source[int(len(source) * offset_fraction) :]
    draw, question = random.Random(seed), encode(QUESTION)
    haystacks, at = [], 0
    for trial in range(trials):
        code = f"{draw.randrange(10**6, 10**7)}"
        needle = encode(NEEDLE.format(code=code))
        room = context - len(begin) - len(needle) - len(question)
        if room < 2 * BOUNDARY_REACH:
            raise ConfigError(f"a context of {context} tokens is too short for a needle: take at least 400")
        hay = source[at : at + room]
        if len(hay) < room:
            raise ConfigError(f"the text ends in trial {trial + 1}: take a longer text, or fewer trials")
        at += room
        for depth in DEPTHS:
            cut = _boundary(hay, room * depth // 100, tokenizer)
            ids = [*begin, *hay[:cut], *needle, *hay[cut:], *question]
            haystacks.append(Haystack(trial, depth, code, torch.tensor(ids)))
    return haystacks


def _boundary(ids: list[int], at: int, tokenizer: Any) -> int:
    """The next end of a sentence or line, or `at` if none is near."""
    for cut in range(at, min(at + BOUNDARY_REACH, len(ids))):
        if tokenizer.decode(ids[cut - 1 : cut]).rstrip(" ").endswith((".", "\n")):
            return cut
    return at


@torch.no_grad()
def search(
    model: Any,
    fingerprint: str | None,
    tokenizer: Any,
    haystacks: Sequence[Haystack],
    configs: Sequence[Config],
    done: Callable[[Haystack, str], bool] = lambda haystack, config: False,
    progress: Progress | None = None,
) -> Iterator[Found]:
    """What each configuration, and full precision, finds in each haystack."""
    methods = {config.text: config.method(model, fingerprint) for config in configs}
    any_method = next(iter(methods.values()))
    report = progress or (lambda what, share: None)
    for i, haystack in enumerate(haystacks):
        report(f"needle {i + 1} of {len(haystacks)}", i / len(haystacks))
        pending = {text: method for text, method in methods.items() if not done(haystack, text)}
        full = not done(haystack, FULL)
        if not pending and not full:
            continue
        prompt, last = haystack.ids[:-1], haystack.ids[-1:]
        windows = [method.statistic for method in pending.values()]
        baseline = FullPrecisionCache(model, any_method, prompt, windows, ANSWER_TOKENS)

        def said(config: str, ids: list[int], resident: int, plain: int, haystack: Haystack = haystack) -> Found:
            answer = tokenizer.decode(ids)
            return Found(haystack.trial, haystack.depth, config, answer, haystack.code in answer, resident, plain)

        if full:
            ids = last
            for _ in range(ANSWER_TOKENS):
                ids = torch.cat([ids, baseline.extend(ids[-1:])[-1].argmax()[None].cpu()])
            plain = len(prompt) * token_bytes(any_method)
            yield said(FULL, ids[1:].tolist(), plain, plain)
            baseline.rewind()
        if not pending:
            continue
        sequences = prefilled(len(prompt), baseline.computed(torch.empty(0)), pending)
        held = [held_bytes(sequence)[:2] for sequence in sequences.values()]
        answers = last.expand(len(sequences), 1).to(model.device)
        for _ in range(ANSWER_TOKENS):
            logits = model(
                input_ids=answers[:, -1:],
                position_ids=torch.tensor([[sequence.length] for sequence in sequences.values()]).to(model.device),
                past_key_values=QAQCache(list(sequences.values())),
            ).logits[:, -1]
            answers = torch.cat([answers, logits.argmax(-1, keepdim=True)], 1)
        for (text, sequence), row, size in zip(sequences.items(), answers[:, 1:].tolist(), held, strict=True):
            sequence.close()
            yield said(text, row, *size)
    report("done", 1.0)


def needle_rows(found: Sequence[Found], configs: Sequence[str], context: int) -> list[NeedleRow]:
    """A row per configuration and depth."""
    rows = []
    for config in configs:
        for depth in sorted({each.depth for each in found}):
            here = [each for each in found if each.depth == depth]
            mine = [each for each in here if each.config == config]
            full = [each for each in here if each.config == FULL]
            rows.append(
                NeedleRow(
                    config=config,
                    context=context,
                    depth=depth,
                    trials=len(mine),
                    found=sum(each.found for each in mine) / len(mine),
                    found_fp16=sum(each.found for each in full) / len(full),
                    compression=sum(each.plain for each in mine) / sum(each.resident for each in mine),
                )
            )
    return rows
