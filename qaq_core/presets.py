"""Presets: which frame, codec, policy and window make up a method.

balanced  centered and shaped rows, progressive Gaussian codes, cost-weighted bits (the default)
paper     QAQ as published: groups, outliers, both bit formulas, attention window
exact     half precision for everything: the reference that quantization is measured against

What others do has names too, see `rivals`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qaq_core import codecs, rivals
from qaq_core.adaptation import Adaptation
from qaq_core.calibration import Calibration, calibrate
from qaq_core.codecs import GaussianCodec, GroupedCodec
from qaq_core.codecs.progressive import ProgressiveCodec, greedy_order
from qaq_core.errors import ConfigError
from qaq_core.frames import LinearFrame, PlainFrame
from qaq_core.method import Method, Target
from qaq_core.pages import PAGE_TOKENS
from qaq_core.policies import BalancedPolicy, ErrorPolicy, FixedPolicy, PaperPolicy
from qaq_core.quantizer import Quantizer
from qaq_core.shape import ModelShape
from qaq_core.window import DecayWindow, MaxWindow

BALANCED_BITS = 2.2


def build(model: Any, fingerprint: str | None, preset: str, **settings: Any) -> Method:
    """The method of a preset. Settings are the keyword arguments of the preset's function."""
    make = PRESETS.get(preset) or rivals.find(preset)
    if make is None:
        known = ", ".join([*PRESETS, *rivals.NAMES])
        raise ConfigError(f"no preset is called {preset!r}; there are {known}")
    shape = ModelShape.of(model)
    target = Target(**{name: settings.pop(f"target_{name}", None) for name in ("bits", "compression", "error")})
    common = {"page_tokens": settings.pop("page_tokens", PAGE_TOKENS), "kernel": settings.pop("kernel", None)}
    try:
        parts = make(model, shape, fingerprint, target, **settings)
    except TypeError as error:
        raise ConfigError(f"preset {preset!r} does not take these settings: {error}") from error
    if target.error is not None and not isinstance(parts["policy"], ErrorPolicy):
        raise ConfigError(f"{preset} does not predict its error: give it target_bits or target_compression")
    weight = next(model.parameters())
    kind: type[Method] = parts.pop("kind", Method)
    return kind(preset=preset, shape=shape, dtype=model.dtype, device=weight.device, **common, **parts)


def balanced(
    model: Any,
    shape: ModelShape,
    fingerprint: str | None,
    target: Target,
    calibration: Calibration | None = None,
    exceptions: bool = True,
    axes: bool = True,
) -> dict[str, Any]:
    """The default. Without a target it holds 2.2 code bits an element after the prompt."""
    known = (calibration or calibrate(model, shape, fingerprint)).to(next(model.parameters()).device)
    device = known.key_mean.device
    costs = (known.key_costs, known.value_costs)
    frame = LinearFrame(
        known.key_matrix,
        known.value_matrix,
        known.key_mean,
        known.value_mean,
        shape.frequencies.to(device),
        torch.tensor(shape.kind, device=device),
    )
    quantizer = Quantizer(frame, ProgressiveCodec([greedy_order(side) for side in costs]))
    wanted = target if target.given else Target(bits=BALANCED_BITS)
    return {
        "quantizer": quantizer,
        "policy": BalancedPolicy(quantizer, costs, exceptions),
        "window": DecayWindow(),
        "target": wanted,
        "adaptation": Adaptation(costs, axes),
    }


def paper(
    model: Any,
    shape: ModelShape,
    fingerprint: str | None,
    target: Target,
    calibration: Calibration | None = None,
    group: str = "layer",
    codec: str = "uniform",
    outlier_ratio: float = 0.01,
    window: int = 5,
    sigma_x: float = 0.02,
    sigma_s: float = 0.002,
    bits: tuple[int, int] = (1, 8),
    exceptions: bool = True,
) -> dict[str, Any]:
    """QAQ as published (arXiv 2403.04643). A target scales both tolerated errors by one factor."""
    if codec not in ("uniform", "normal"):
        raise ConfigError(f"the paper preset takes the codecs uniform and normal, not {codec!r}")
    if not 0 <= outlier_ratio < 1:
        raise ConfigError(f"outlier_ratio must be at least 0 and below 1, not {outlier_ratio}")
    known = (calibration or calibrate(model, shape, fingerprint)).to(next(model.parameters()).device)
    made = codecs.make(codec, group=group)
    assert isinstance(made, GroupedCodec)
    policy = PaperPolicy(
        known.query_norm, made.dims, sigma_x, sigma_s, bits, normal=codec == "normal", exceptions=exceptions
    )
    return {
        "quantizer": Quantizer(PlainFrame(), made),
        "policy": policy,
        "window": MaxWindow(window),
        "target": target,
        "outlier_ratio": outlier_ratio,
    }


def exact(model: Any, shape: ModelShape, fingerprint: str | None, target: Target) -> dict[str, Any]:
    """Half precision for every vector, through the same packed path."""
    if target.given:
        raise ConfigError("the exact preset takes no target: it holds 16 bits an element")
    return {
        "quantizer": Quantizer(PlainFrame(), GaussianCodec()),
        "policy": FixedPolicy(16, 16),
        "window": DecayWindow(),
    }


PRESETS: dict[str, Callable[..., dict[str, Any]]] = {"balanced": balanced, "paper": paper, "exact": exact}
