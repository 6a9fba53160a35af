"""A served answer beside full precision: both caches get the same tokens in this process, and are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, RepetitionPenaltyLogitsProcessor

from qaq_core import Method, QAQCache, SequenceCache
from qaq_core.base.pages import KEY, VALUE
from qaq_core.models import LoadedModel
from services.cli.demo_result import FullPrecision, Piece

CHUNK = 512
"""Tokens of a prompt that are computed in one pass, as a worker does."""
ANSWER_CHUNK = 64
"""Tokens of the answer whose full-precision distributions are in memory at once."""
PASSAGE = 120
"""Tokens of the passage that is shown."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Answered:
    """A greedy answer of a server: token ids of prompt and answer, at least one each, without an end-of-sequence token.

    Attributes:
        penalty: the repetition penalty. most_tokens: limit of the answer's length.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    penalty: float
    most_tokens: int


@torch.inference_mode()
def full_precision(
    loaded: LoadedModel, method: Method, asked: Answered, progress: Progress = lambda what, share: None
) -> FullPrecision:
    """Computes a prompt and its answer in both caches, and then what full precision answers.

    Args:
        method: of the quantized cache, as the server has it.
    """
    start = len(asked.prompt)
    ids = torch.tensor([[*asked.prompt, *asked.answer]], device=loaded.model.device)
    cache, sequence = DynamicCache(config=loaded.model.config), SequenceCache(method)
    widened = Widened(sequence)
    kl, agreed, same, repeated = [], [], [], []
    progress("the prompt, in full precision", 0.0)
    expected = _expected(loaded, ids, start, cache)
    theirs = next(expected)
    progress("the prompt, quantized", 0.2)
    for at, mine in enumerate(_quantized(loaded, ids, start, sequence), start):
        progress("the answer, in both", 0.4 + 0.4 * (at - start) / len(asked.answer))
        p, q = theirs.log_softmax(-1), mine.log_softmax(-1)
        kl.append(max(0.0, float((p.exp() * (p - q)).sum())))  # rounding may give a tiny negative sum
        agreed.append(bool(theirs.argmax() == mine.argmax()))
        served = int(ids[0, at])
        same.append(_greedy(theirs, ids[:, :at], asked.penalty) == served)
        repeated.append(_greedy(mine, ids[:, :at], asked.penalty) == served)
        widened.look()
        theirs = next(expected, theirs)
    progress("the answer of full precision", 0.8)
    own = _answer(loaded, cache, ids[:, : start + _leading(same)], asked)
    alike = own == list(asked.answer)
    result = FullPrecision(
        text=loaded.tokenizer.decode(own, skip_special_tokens=True),
        tokens=len(own),
        compared_tokens=len(kl),
        same_tokens=_leading(same),
        first_difference=None if alike else _leading(same),
        kl_mean=sum(kl) / len(kl),
        kl_p99=float(torch.tensor(kl).quantile(0.99)),
        kl_max=max(kl),
        top1_agreement=sum(agreed) / len(agreed),
        kv_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
        repeated_tokens=_leading(repeated),
        requantized_tokens=int((widened.rows > 0).sum()),
        requantized_rows=int(widened.rows.sum()),
        passage=_passage(loaded, asked.prompt, widened.rows),
    )
    sequence.close()
    progress("done", 1.0)
    return result


class Widened:
    """Counts the vectors of a sequence that got more bits, by position.

    Attributes:
        rows: int64 [packed tokens and those before them].
    """

    def __init__(self, sequence: SequenceCache) -> None:
        self._sequence = sequence
        self._before = torch.zeros(2, 0)
        self.rows = torch.zeros(0, dtype=torch.int64)

    def look(self) -> None:
        """Compares the widths with those of the last look."""
        packed = self._sequence.packed
        now = torch.stack([packed.widths(side) for side in (KEY, VALUE)]).cpu()
        self.rows = torch.nn.functional.pad(self.rows, (0, packed.stop - len(self.rows)))
        known = self._before.shape[-1]
        if known:
            risen = (now[..., :known] > self._before).sum((0, 1, 2))
            self.rows[packed.start : packed.start + known] += risen
        self._before = now


def _expected(loaded: LoadedModel, ids: torch.Tensor, start: int, cache: DynamicCache) -> Iterator[torch.Tensor]:
    """Full-precision logits [vocabulary] for each token from `start` on."""
    if start > 1:
        for chunk in ids[:, : start - 1].split(CHUNK, 1):
            loaded.model(input_ids=chunk, past_key_values=cache, logits_to_keep=1)
    for chunk in ids[:, start - 1 : -1].split(ANSWER_CHUNK, 1):
        yield from loaded.model(input_ids=chunk, past_key_values=cache).logits[0].float()


def _quantized(loaded: LoadedModel, ids: torch.Tensor, start: int, sequence: SequenceCache) -> Iterator[torch.Tensor]:
    """The same from a quantized cache, which decodes the answer token by token."""
    sequence.expect_prompt(start)
    prompt, answer = ids[:, :start].split(CHUNK, 1), ids[:, start:-1].split(1, 1)
    for i, chunk in enumerate([*prompt, *(token for token in answer if token.shape[1])], 1):
        first, cache = sequence.length, QAQCache([sequence])
        logits = loaded.model(
            input_ids=chunk,
            position_ids=torch.arange(first, first + chunk.shape[1], device=ids.device)[None],
            past_key_values=cache,
            logits_to_keep=1,
            qaq_cache=cache,
        ).logits[0, -1]
        if i >= len(prompt):
            yield logits.float()


def _answer(loaded: LoadedModel, cache: DynamicCache, ids: torch.Tensor, asked: Answered) -> list[int]:
    """What full precision answers, of which `ids` [1, n] has the beginning. The cache then holds all but its end."""
    start, held = len(asked.prompt), ids.shape[1] - 1
    if cache.get_seq_length() > held:
        if any(cache.is_sliding):  # its layers have dropped what they would have to see again
            cache.reset()
        else:
            cache.crop(held - cache.get_seq_length())
    new = ids[:, cache.get_seq_length() :]
    while ids.shape[1] - start < asked.most_tokens:
        logits = loaded.model(input_ids=new, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
        token = _greedy(logits, ids, asked.penalty)
        if token in loaded.eos_token_ids:
            break
        new = torch.tensor([[token]], device=ids.device)
        ids = torch.cat([ids, new], 1)
    return [int(token) for token in ids[0, start:]]


def _greedy(logits: torch.Tensor, before: torch.Tensor, penalty: float) -> int:
    """The most likely token after the repetition penalty of those before it, ids [1, n]."""
    return int(RepetitionPenaltyLogitsProcessor(penalty)(before, logits[None]).argmax())


def _leading(flags: Sequence[bool]) -> int:
    return flags.index(False) if False in flags else len(flags)


def _passage(loaded: LoadedModel, prompt: Sequence[int], rows: torch.Tensor) -> list[Piece]:
    """The tokens of the prompt among which the most vectors got more bits."""
    counts = rows[: len(prompt)]
    if not counts.sum():
        return []
    sums = counts.unfold(0, min(PASSAGE, len(counts)), 1).sum(1)
    first = int(sums.argmax())
    chosen = zip(prompt[first : first + PASSAGE], counts[first : first + PASSAGE].tolist(), strict=False)
    return [Piece(text=loaded.tokenizer.decode([token]), rows=count) for token, count in chosen]
