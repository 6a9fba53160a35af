"""Speed of prompts: every cache computes the same prompt, in one process and in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from qaq_core.base.errors import ConfigError
from qaq_eval.speed import llama_cpp
from qaq_eval.speed.decode import DENSE, decoder


@dataclass(frozen=True)
class PrefillSpeed:
    """One cache and one prompt. Times are medians over the rounds.

    Attributes:
        cache: "dynamic", a preset with its attention kernel ("balanced/cpu"), or another.
        milliseconds: from the first token's embedding to the logits after the last, packing included.
        cpu_milliseconds: of all threads of this process; what else runs on the machine matters less to it.
        ratio_to_dynamic_cache: DynamicCache's time over this one's, median of the rounds' ratios.
        cpu_ratio_to_dynamic_cache: the same of CPU times.
    """

    context: int
    cache: str
    milliseconds: float
    cpu_milliseconds: float
    ratio_to_dynamic_cache: float
    cpu_ratio_to_dynamic_cache: float


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
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for turn in range(rounds):
            for name in names:
                if report:
                    report(f"{context:,} tokens: {name}", (at + turn / rounds) / len(contexts))
                times[name].append(_timed(model, fingerprint, ids[:, :context], name, source))
        rows += [_row(context, name, times[name], times[DENSE]) for name in names]
    return rows


def _timed(model: Any, fingerprint: str | None, ids: torch.Tensor, name: str, source: str) -> tuple[float, float]:
    """Seconds, and CPU seconds, of a prompt in a new cache."""
    with ExitStack() as stack:
        if name.startswith(llama_cpp.PREFIX):
            one: Any = stack.enter_context(llama_cpp.LlamaCpp(source, name, *ids.shape))
        else:
            one = decoder(model, fingerprint, name)
        begun, used = time.perf_counter(), time.process_time()
        one.decode(ids)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun, time.process_time() - used


def _row(context: int, name: str, times: list[tuple[float, float]], dense: list[tuple[float, float]]) -> PrefillSpeed:
    wall, cpu = (median(part) for part in zip(*times, strict=True))
    ratios = [(theirs[0] / ours[0], theirs[1] / ours[1]) for ours, theirs in zip(times, dense, strict=True)]
    wall_ratio, cpu_ratio = (median(part) for part in zip(*ratios, strict=True))
    return PrefillSpeed(context, name, wall * 1e3, cpu * 1e3, wall_ratio, cpu_ratio)
