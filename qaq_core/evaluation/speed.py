"""How fast decoding is from each kind of cache, all in one process, step by step in turn."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache

from qaq_core.cache import QAQCache
from qaq_core.errors import ConfigError
from qaq_core.method import Method

DENSE = "dynamic"
"""transformers' DynamicCache, which every other cache is compared with."""
HALF = "dynamic-bf16"
"""The same in bfloat16, weights included."""
QUANTIZED = {"quanto-int4": "quanto", "hqq-int4": "hqq"}
"""transformers' QuantizedCache, where its backend is installed."""
WARM_UP = 1
"""First steps that do not count: backends compile, and scratch is made."""


@dataclass(frozen=True)
class SpeedRow:
    """One cache at one context.

    Attributes:
        cache: what decoded: "dynamic", or a preset and its attention kernel, "balanced/cpu", or another.
        batch: sequences decoded together.
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

    The first WARM_UP steps are not counted.

    Args:
        ids: int64 [batch, context + steps].
        caches: presets, each with "/" and a kernel of `attention.KERNELS` if not the default one; "dynamic-bf16";
            "quanto-int4" and "hqq-int4".
    """
    batch, context = ids.shape[0], ids.shape[1] - steps
    if context < 1:
        raise ConfigError(f"{ids.shape[1]} tokens leave no prompt before {steps} decoded ones")
    if steps <= WARM_UP:
        raise ConfigError(f"{steps} steps are too few: the first {WARM_UP} do not count")
    held: dict[str, Any] = {DENSE: DynamicCache()}
    held.update((name, _cache(model, fingerprint, name)) for name in caches)
    models = dict.fromkeys(held, model)
    if HALF in held:
        models[HALF] = copy.deepcopy(model).to(torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in held}
    for name, cache in held.items():
        _say(report, f"prompt: {name}", 0.0)
        models[name](ids[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for step in range(steps):
        _say(report, "decoding", step / steps)
        at = context + step
        for name, cache in held.items():
            begun = time.perf_counter()
            models[name](
                ids[:, at : at + 1],
                position_ids=torch.full((batch, 1), at, device=ids.device),
                past_key_values=cache,
                use_cache=True,
            )
            if ids.is_cuda:
                torch.cuda.synchronize()
            if step >= WARM_UP:
                times[name].append(time.perf_counter() - begun)
    dense = fmean(times[DENSE])
    return [
        SpeedRow(
            context=context,
            batch=batch,
            cache=name,
            tokens_per_second=batch / fmean(times[name]),
            median_ms=median(times[name]) * 1000,
            ratio_to_dynamic_cache=dense / fmean(times[name]),
            kv_bytes=cache.nbytes if isinstance(cache, QAQCache) else _bytes(cache),
        )
        for name, cache in held.items()
    ]


def _cache(model: Any, fingerprint: str | None, name: str) -> Any:
    if name == HALF:
        return DynamicCache()
    if name in QUANTIZED:
        backend = QUANTIZED[name]
        try:
            return QuantizedCache(backend, model.config)
        except ImportError as error:
            raise ConfigError(f"{name} needs transformers' {backend} backend, which is not installed") from error
    return QAQCache([], _method(model, fingerprint, name))


def _method(model: Any, fingerprint: str | None, name: str) -> Method:
    preset, _, kernel = name.partition("/")
    return Method.for_model(model, fingerprint, preset, **({"kernel": kernel} if kernel else {}))


def _bytes(cache: Any) -> int:
    """Bytes of every tensor that a transformers cache holds, those inside of quantized ones included."""
    storages: dict[int, int] = {}

    def add(held: Any) -> None:
        if isinstance(held, torch.Tensor):
            inner, _ = held.__tensor_flatten__() if hasattr(held, "__tensor_flatten__") else ((), None)
            for name in inner:
                add(getattr(held, name))
            if not inner:
                storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        elif isinstance(held, dict):
            for part in held.values():
                add(part)
        elif isinstance(held, (list, tuple)):
            for part in held:
                add(part)

    for layer in cache.layers:
        add(vars(layer))
    return sum(storages.values())


def _say(report: Callable[[str, float], None] | None, what: str, share: float) -> None:
    if report:
        report(what, share)
