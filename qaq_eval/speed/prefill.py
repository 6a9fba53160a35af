"""Speed of prompts: every cache computes the same prompt, in one process and in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch

from qaq_core import QAQCache, SequenceCache
from qaq_core.base.errors import ConfigError
from qaq_eval.speed import llama_cpp
from qaq_eval.speed.decode import DENSE, decoder


@dataclass(frozen=True)
class PrefillSpeed:
    """One cache and one prompt. Times are medians over the rounds.

    Attributes:
        cache: "dynamic", a preset with its attention kernel ("balanced/cpu"), or another.
        first_token_milliseconds: from the first token's embedding to the logits after the last: a worker packs a prompt
            when the first token has been sent.
        milliseconds: the same and packing.
        cpu_milliseconds: of all threads of this process; what else runs on the machine matters less to it.
        ratio_to_dynamic_cache: DynamicCache's time over this one's, median of the rounds' ratios.
        cpu_ratio_to_dynamic_cache, first_token_ratio_to_dynamic_cache: the same of CPU times, and to the first token.
    """

    context: int
    cache: str
    first_token_milliseconds: float
    milliseconds: float
    cpu_milliseconds: float
    first_token_ratio_to_dynamic_cache: float
    ratio_to_dynamic_cache: float
    cpu_ratio_to_dynamic_cache: float


class _Times(NamedTuple):
    """Seconds of a prompt."""

    first_token: float
    all: float
    cpu: float


@torch.inference_mode()
def prefill_speed(
    model: Any,
    fingerprint: str | None,
    ids: torch.Tensor,
    contexts: Sequence[int],
    rounds: int,
    caches: Sequence[str],
    report: Callable[[str, float], None] | None = None,
    source: str = "",
) -> list[PrefillSpeed]:
    """Times the first `contexts` tokens as one prompt, in each cache in turn, after a short prompt that is not timed.

    Args:
        ids: int64 [1, tokens].
        rounds: times that each cache computes each prompt.
        caches: as `decode_speed` takes them, beside DynamicCache.
        source: where the model was loaded from; llama.cpp reads the same GGUF file.
    """
    if min(contexts) < 1 or max(contexts) > ids.shape[1]:
        raise ConfigError(f"prompts must have 1 to {ids.shape[1]} tokens, as many as the text has; not {contexts}")
    names = list(dict.fromkeys((DENSE, *caches)))
    rows = []
    for name in names:
        _timed(model, fingerprint, ids[:, : min(64, min(contexts))], name, source)
    for at, context in enumerate(contexts):
        times: dict[str, list[_Times]] = {name: [] for name in names}
        for turn in range(rounds):
            for name in names:
                if report:
                    report(f"{context:,} tokens: {name}", (at + turn / rounds) / len(contexts))
                times[name].append(_timed(model, fingerprint, ids[:, :context], name, source))
        rows += [_row(context, name, times[name], times[DENSE]) for name in names]
    return rows


def _timed(model: Any, fingerprint: str | None, ids: torch.Tensor, name: str, source: str) -> _Times:
    """What a prompt takes in a new cache."""
    with ExitStack() as stack:
        sequence = None
        if name.startswith(llama_cpp.PREFIX):
            one: Any = stack.enter_context(llama_cpp.LlamaCpp(source, name, *ids.shape))
        else:
            one = decoder(model, fingerprint, name)
            if isinstance(one.cache, QAQCache):
                sequence = SequenceCache(one.cache.method)
                sequence.pack_later()
                one.cache = QAQCache([sequence])
        begun, used = time.perf_counter(), time.process_time()
        one.decode(ids)
        _wait(ids)
        first = time.perf_counter() - begun
        if sequence is not None:
            sequence.pack_prompt()
            _wait(ids)
        return _Times(first, time.perf_counter() - begun, time.process_time() - used)


def _wait(ids: torch.Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()


def _row(context: int, name: str, times: list[_Times], dense: list[_Times]) -> PrefillSpeed:
    took = [median(part) * 1e3 for part in zip(*times, strict=True)]
    rounds = zip(times, dense, strict=True)
    ratios = [[theirs / ours for ours, theirs in zip(*pair, strict=True)] for pair in rounds]
    return PrefillSpeed(context, name, *took, *(median(part) for part in zip(*ratios, strict=True)))
