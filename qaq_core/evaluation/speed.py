"""How fast decoding is from each kind of cache, all in one process, step by step in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from transformers import DynamicCache

from qaq_core.cache import QAQCache
from qaq_core.errors import ConfigError
from qaq_core.method import Method

DENSE = "dynamic"
"""transformers' DynamicCache, which every other cache is compared with."""


@dataclass(frozen=True)
class SpeedRow:
    """One cache at one context.

    Attributes:
        cache: "dynamic", or a preset and the attention kernel: "balanced/cpu".
        tokens_per_second: by the mean step, exceptions and packing included.
        median_ms: of a step. ratio_to_dynamic_cache: of tokens per second.
        kv_bytes: resident bytes after the last step.
    """

    context: int
    batch: int
    cache: str
    tokens_per_second: float
    median_ms: float
    ratio_to_dynamic_cache: float
    kv_bytes: int


@torch.inference_mode()
def decode_speed(
    model: Any,
    fingerprint: str | None,
    ids: torch.Tensor,
    steps: int,
    caches: Sequence[str],
    report: Callable[[str, float], None] | None = None,
) -> list[SpeedRow]:
    """Prefills every cache with the same tokens, then decodes the next ones from each in turn.

    Args:
        ids: int64 [1, context + steps].
        caches: presets, each with "/" and a kernel of `attention.KERNELS` if not the default one.
    """
    context = ids.shape[1] - steps
    if context < 1:
        raise ConfigError(f"{ids.shape[1]} tokens leave no prompt before {steps} decoded ones")
    held: dict[str, Any] = {DENSE: DynamicCache()}
    held.update((name, QAQCache([], _method(model, fingerprint, name))) for name in caches)
    times: dict[str, list[float]] = {name: [] for name in held}
    for name, cache in held.items():
        _say(report, f"prompt: {name}", 0.0)
        model(ids[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for step in range(steps):
        _say(report, "decoding", step / steps)
        at = context + step
        for name, cache in held.items():
            begun = time.perf_counter()
            model(
                ids[:, at : at + 1],
                position_ids=torch.tensor([[at]], device=ids.device),
                past_key_values=cache,
                use_cache=True,
            )
            if ids.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begun)
    dense = fmean(times[DENSE])
    return [
        SpeedRow(
            context=context,
            batch=1,
            cache=name,
            tokens_per_second=1 / fmean(times[name]),
            median_ms=median(times[name]) * 1000,
            ratio_to_dynamic_cache=dense / fmean(times[name]),
            kv_bytes=cache.nbytes if isinstance(cache, QAQCache) else _dense_bytes(cache),
        )
        for name, cache in held.items()
    ]


def _method(model: Any, fingerprint: str | None, name: str) -> Method:
    preset, _, kernel = name.partition("/")
    return Method.for_model(model, fingerprint, preset, **({"kernel": kernel} if kernel else {}))


def _dense_bytes(cache: DynamicCache) -> int:
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


def _say(report: Callable[[str, float], None] | None, what: str, share: float) -> None:
    if report:
        report(what, share)
