"""Speed of decoding from each kind of cache, in one process and in turn, step by step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Protocol

import torch
from transformers import DynamicCache, QuantizedCache

import qaq_eval.baselines  # noqa: F401  (registers them as presets)
from qaq_core import Method, QAQCache, make_method
from qaq_core.base.errors import ConfigError, UnsupportedModelError
from qaq_core.models import Decoder as LeanModel
from qaq_eval.speed import llama_cpp
from qaq_eval.speed.step_parts import StepPart, step_parts

DENSE = "dynamic"
"""transformers' DynamicCache, the reference of every ratio."""
BFLOAT16 = "dynamic-bf16"
"""The same in bfloat16, weights included."""
QUANTIZED = {"quanto-int4": "quanto", "hqq-int4": "hqq"}
"""transformers' QuantizedCache, if its backend is installed."""
MODULES = "/modules"
"""After a preset: its steps go through transformers' modules, as those of other caches do."""
IN_TIME = "-in-time"
"""After a preset: its exceptions are answered in time."""
WARM_UP = 1
"""First steps that are not timed: backends compile and allocate buffers."""


@dataclass(frozen=True)
class DecodeSpeed:
    """One cache at one context.

    Attributes:
        cache: "dynamic", a preset with its attention kernel ("balanced/cpu"), or another.
        batch: sequences decoded together.
        tokens_per_second: from the mean step, exceptions and packing included.
        median_ms: median time of a step.
        ratio_to_dynamic_cache: tokens per second over those of DynamicCache.
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
    source: str = "",
    profiled: list[StepPart] | None = None,
) -> list[DecodeSpeed]:
    """Prefills every cache with the same tokens, then decodes the next tokens from each in turn.

    The first WARM_UP steps are not timed.

    Args:
        ids: int64 [batch, context + steps].
        caches: presets, each with "/" and a kernel of `attention.KERNELS` if not the default one, and with MODULES;
            "dynamic-bf16"; "quanto-int4" and "hqq-int4"; those of `llama_cpp.CACHES`. Without MODULES, steps of presets
            go through `qaq_core.models.Decoder` as a worker's do, where it knows the model.
        source: where the model was loaded from; llama.cpp reads the same GGUF file.
        profiled: list to which the parts of a step of QAQ's caches are appended; these decode the tokens once more.
    """
    batch, context = ids.shape[0], ids.shape[1] - steps
    if context < 1:
        raise ConfigError(f"{ids.shape[1]} tokens leave no prompt before {steps} decoded ones")
    if steps <= WARM_UP:
        raise ConfigError(f"{steps} steps are too few: the first {WARM_UP} are not timed")
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        held: dict[str, Decoder] = {}
        for name in dict.fromkeys((DENSE, *caches)):
            _say(report, f"prompt: {name}", 0.0)
            times[name] = []
            if name.startswith(llama_cpp.PREFIX):
                held[name] = stack.enter_context(llama_cpp.LlamaCpp(source, name, *ids.shape))
            else:
                held[name] = decoder(model, fingerprint, name)
            held[name].decode(ids[:, :context])
        for step in range(steps):
            _say(report, "decoding", step / steps)
            for name, one in held.items():
                begun = time.perf_counter()
                one.decode(ids[:, context + step : context + step + 1])
                if ids.is_cuda:
                    torch.cuda.synchronize()
                if step >= WARM_UP:
                    times[name].append(time.perf_counter() - begun)
        bytes_of = {name: one.nbytes for name, one in held.items()}
        if profiled is not None:
            for name, one in held.items():
                if isinstance(one, ModelDecoder) and isinstance(one.cache, QAQCache):
                    profiled += step_parts(one, name, ids[:, context:])
    dense = fmean(times[DENSE])
    return [
        DecodeSpeed(
            context=context,
            batch=batch,
            cache=name,
            tokens_per_second=batch / fmean(times[name]),
            median_ms=median(times[name]) * 1000,
            ratio_to_dynamic_cache=dense / fmean(times[name]),
            kv_bytes=bytes_of[name],
        )
        for name in held
    ]


class Decoder(Protocol):
    """A batch of sequences of one length that are decoded together."""

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Computes the next tokens, int64 [batch, n]. Returns the logits [batch, vocabulary] after the last ones."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        ...


class ModelDecoder:
    """A transformers model with a cache.

    Args:
        lean: what computes steps in the model's place.
    """

    def __init__(self, model: Any, cache: Any, lean: LeanModel | None = None) -> None:
        self.model, self.cache, self.lean, self._length = model, cache, lean, 0

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Decoder`."""
        positions = torch.full_like(ids, self._length) if ids.shape[1] == 1 else None
        self._length += ids.shape[1]
        if self.lean is not None and positions is not None:
            return self.lean(ids, positions, self.cache)[:, -1]
        own = {"qaq_cache": self.cache} if isinstance(self.cache, QAQCache) else {}
        output = self.model(
            ids, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **own
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes if isinstance(self.cache, QAQCache) else _bytes(self.cache)


def decoder(model: Any, fingerprint: str | None, name: str) -> ModelDecoder:
    """A model with an empty cache of that name, see `decode_speed`."""
    if name == BFLOAT16:
        return ModelDecoder(copy.deepcopy(model).to(torch.bfloat16), DynamicCache())
    if name == DENSE:
        return ModelDecoder(model, DynamicCache())
    cache = _cache(model, fingerprint, name.removesuffix(MODULES))
    lean = not name.endswith(MODULES) and isinstance(cache, QAQCache)
    return ModelDecoder(model, cache, _lean(model) if lean else None)


def _lean(model: Any) -> LeanModel | None:
    try:
        return LeanModel(model)
    except UnsupportedModelError:  # the worker too takes the model's own modules then
        return None


def _cache(model: Any, fingerprint: str | None, name: str) -> Any:
    if name in QUANTIZED:
        backend = QUANTIZED[name]
        try:
            return QuantizedCache(backend, model.config)
        except ImportError as error:
            raise ConfigError(f"{name} needs transformers' {backend} backend, which is not installed") from error
    return QAQCache([], _method(model, fingerprint, name))


def _method(model: Any, fingerprint: str | None, name: str) -> Method:
    preset, _, kernel = name.partition("/")
    settings: dict[str, Any] = {"kernel": kernel} if kernel else {}
    if preset.endswith(IN_TIME):
        settings["exceptions"] = "in-time"
    return make_method(model, fingerprint, preset.removesuffix(IN_TIME), **settings)


def _bytes(cache: Any) -> int:
    """Bytes of every tensor in a transformers cache, those inside quantized tensors included."""
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
