"""Presets: the transform, codec, policy and attention statistic of a method.

balanced  centered and whitened rows, progressive Gaussian codes, cost-weighted bits (the default)
paper     QAQ as published: grouped codecs, outliers, both bit formulas, attention window
fp16      half precision for everything: the reference that quantization is compared with

What others do has names too, see `baselines`.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from qaq_core.allocation import (
    AttentionWindow,
    BalancedPolicy,
    DecayingMeanSquare,
    ErrorPolicy,
    FixedPolicy,
    PaperPolicy,
    Target,
)
from qaq_core.attention import use_qaq_attention
from qaq_core.base.checks import flag, number, one_of, whole
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import PAGE_TOKENS
from qaq_core.cache.in_time import InTimeLimits
from qaq_core.cache.method import Method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.calibration import REVISION, Calibration, Progress, calibrate, shown
from qaq_core.kernels import KERNELS
from qaq_core.models import ModelShape
from qaq_core.quantization import (
    Adaptation,
    GaussianCodec,
    GroupedCodec,
    IdentityTransform,
    LinearTransform,
    ProgressiveCodec,
    Quantizer,
    make_codec,
)
from qaq_core.quantization.codecs.grouped import GRANULARITIES
from qaq_core.quantization.codecs.progressive import greedy_order

log = logging.getLogger(__name__)

BALANCED_BITS = 2.2
MOST_PAGE_TOKENS = 1024
MOST_STEPS = 128
"""Of an attention window: a byte a token, layer and head each."""


Parts = dict[str, Any]
"""What a preset gives: arguments of `Method`, and under "kind" a subclass of it."""


def make_method(
    model: Any,
    fingerprint: str | None = None,
    preset: str = "balanced",
    progress: Progress | None = None,
    **settings: Any,
) -> Method:
    """The method of a preset for a transformers causal LM, which is switched to QAQ's attention.

    Args:
        fingerprint: of the model's weights, which finds its calibration; if not given, the one that `load_model` left
            on the model, or a hash of the weights.
        progress: called with a stage and how much of it is done, 0 to 1, if the model has to be calibrated.
        settings: keyword arguments of the preset's function; and target_bits, target_compression, target_error,
            page_tokens, kernel.
    Raises:
        UnsupportedModelError, ConfigError.
    """
    make = find_preset(preset)
    shape = ModelShape.of(model)
    if fingerprint is not None and not (isinstance(fingerprint, str) and re.fullmatch(r"[\w.-]{1,128}", fingerprint)):
        raise ConfigError(f"a fingerprint is what load_model gives, or None; it is not {fingerprint!r}")
    target = Target(**{name: settings.pop(f"target_{name}", None) for name in ("bits", "compression", "error")})
    page_tokens = whole("page_tokens", settings.pop("page_tokens", PAGE_TOKENS), 1, MOST_PAGE_TOKENS)
    kernel = settings.pop("kernel", None)
    if kernel is not None:
        one_of("kernel", kernel, KERNELS)
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress must be a function of a stage and a share, or None, not {progress!r}")
    arguments = (model, shape, fingerprint, target)
    try:
        inspect.signature(make).bind(*arguments, **settings)
    except TypeError as error:
        raise ConfigError(f"preset {preset!r} does not take these settings: {error}") from error
    with shown(progress) if progress else nullcontext():
        parts = make(*arguments, **settings)
    if target.error is not None and not isinstance(parts["policy"], ErrorPolicy):
        raise ConfigError(f"{preset} does not predict its error: give it target_bits or target_compression")
    weight = next(model.parameters())
    kind: type[Method] = parts.pop("kind", Method)
    parts = {"new_sequence": SequenceCache, "page_tokens": page_tokens, "kernel": kernel, **parts}
    method = kind(preset=preset, shape=shape, dtype=model.dtype, device=weight.device, **parts)
    use_qaq_attention(model)
    return method


def calibration_of(
    model: Any, shape: ModelShape, fingerprint: str | None, given: Calibration | None = None
) -> Calibration:
    """The calibration that a preset was given, or the model's, on the model's device.

    Raises:
        ConfigError: it is none, or another model's.
    """
    if given is not None and not isinstance(given, Calibration):
        raise ConfigError(f"calibration must be a qaq_core.calibration.Calibration or None, not {given!r:.80}")
    if given is not None:
        given.check(shape)
        if given.revision != REVISION:
            log.warning("the calibration was measured by a version that measured other things; measure it again")
    return (given or calibrate(model, shape, fingerprint)).to(next(model.parameters()).device)


def balanced(
    model: Any,
    shape: ModelShape,
    fingerprint: str | None,
    target: Target,
    calibration: Calibration | None = None,
    exceptions: bool | str | InTimeLimits = True,
    rotation: bool = True,
) -> dict[str, Any]:
    """The default. Without a target it holds 2.2 code bits per element after prefill.

    Args:
        exceptions: when a row that needs more bits gets them: "off" never, "async" (or True) a few steps later,
            "in-time" (or its bounds) also in the very step that looks at it.
    """
    flag("rotation", rotation)
    asked, in_time = _exceptions(exceptions)
    known = calibration_of(model, shape, fingerprint, calibration)
    device = known.key_mean.device
    costs = (known.key_costs, known.value_costs)
    transform = LinearTransform(
        known.key_matrix,
        known.value_matrix,
        known.key_mean,
        known.value_mean,
        shape.frequencies.to(device),
        torch.tensor(shape.kind, device=device),
    )
    quantizer = Quantizer(transform, ProgressiveCodec([greedy_order(side) for side in costs]))
    wanted = target if target.given else Target(bits=BALANCED_BITS)
    return {
        "quantizer": quantizer,
        "policy": BalancedPolicy(quantizer, costs, asked),
        "statistic": DecayingMeanSquare(),
        "target": wanted,
        "adaptation": Adaptation(costs, rotation),
        "in_time": in_time,
    }


EXCEPTIONS = ("off", "async", "in-time")


def _exceptions(setting: bool | str | InTimeLimits) -> tuple[bool, InTimeLimits | None]:
    """Whether rows are reviewed, and the bounds of exceptions in time, if there are any."""
    if isinstance(setting, InTimeLimits):
        return True, setting
    if isinstance(setting, str):
        one_of("exceptions", setting, EXCEPTIONS)
        return setting != "off", InTimeLimits() if setting == "in-time" else None
    flag("exceptions", setting)
    return setting, None


def paper(
    model: Any,
    shape: ModelShape,
    fingerprint: str | None,
    target: Target,
    calibration: Calibration | None = None,
    granularity: str = "layer",
    codec: str = "uniform",
    outlier_ratio: float = 0.01,
    attention_window: int = 5,
    sigma_x: float = 0.02,
    sigma_s: float = 0.002,
    bits: tuple[int, int] = (1, 8),
    exceptions: bool = True,
) -> dict[str, Any]:
    """QAQ as published (arXiv 2403.04643). A target scales both tolerated errors by one factor."""
    one_of("codec", codec, ("uniform", "normal"))
    one_of("granularity", granularity, GRANULARITIES)
    number("outlier_ratio", outlier_ratio, 0, 0.99)
    whole("attention_window", attention_window, 1, MOST_STEPS)
    number("sigma_x", sigma_x, 0, 1000, above=True)
    number("sigma_s", sigma_s, 0, 1000, above=True)
    flag("exceptions", exceptions)
    known = calibration_of(model, shape, fingerprint, calibration)
    made = make_codec(codec, granularity=granularity)
    assert isinstance(made, GroupedCodec)
    policy = PaperPolicy(
        known.query_norm, made.dims, sigma_x, sigma_s, bits, normal=codec == "normal", exceptions=exceptions
    )
    return {
        "quantizer": Quantizer(IdentityTransform(), made),
        "policy": policy,
        "statistic": AttentionWindow(attention_window),
        "target": target,
        "outlier_ratio": outlier_ratio,
    }


def fp16(model: Any, shape: ModelShape, fingerprint: str | None, target: Target) -> dict[str, Any]:
    """Half precision for every vector, through the same packed path."""
    if target.given:
        raise ConfigError("the fp16 preset takes no target: it holds 16 bits an element")
    return {
        "quantizer": Quantizer(IdentityTransform(), GaussianCodec()),
        "policy": FixedPolicy(16, 16),
        "statistic": DecayingMeanSquare(),
    }


Preset = Callable[..., Parts]

PRESETS: dict[str, Preset] = {"balanced": balanced, "paper": paper, "fp16": fp16}

_FAMILIES: list[tuple[str, Callable[[str], Preset | None]]] = []


def register_preset(name: str, preset: Preset) -> None:
    """Adds a preset of your own.

    Args:
        preset: gets the model, its shape, its fingerprint, the target, and settings by keyword; returns `Parts`.
    """
    PRESETS[name] = preset


def register_family(name: str, find: Callable[[str], Preset | None]) -> None:
    """Adds presets whose names follow a pattern, such as "uniform-3".

    Args:
        name: of the family, in error messages.
        find: gets a name; returns the preset of that name, or None.
    """
    _FAMILIES.append((name, find))


def find_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ConfigError: there is none; the message names those there are.
    """
    if isinstance(name, str):
        if name in PRESETS:
            return PRESETS[name]
        for _, find in _FAMILIES:
            found = find(name)
            if found is not None:
                return found
    known = ", ".join([*PRESETS, *(family for family, _ in _FAMILIES)])
    raise ConfigError(f"no preset is called {name!r}; there are {known}")
