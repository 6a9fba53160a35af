"""Baselines: what others do, through the same packed path and counted by the same bytes. One file per baseline.

A baseline is named by a pattern, such as `uniform-3`. Like a preset it says which transform, codec, policy and
statistic make up a method. Those that quantize keep the sinks exact, as the presets do; those that evict hold what they
keep in half precision.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from qaq_core import ConfigError, Target, register_family
from qaq_core.models import ModelShape
from qaq_eval.baselines import h2o, hadamard, kivi, scissorhands, split, uniform

_ALL: tuple[Any, ...] = (uniform, hadamard, split, kivi, h2o, scissorhands)
NAMES = tuple(baseline.NAME for baseline in _ALL)


def register() -> None:
    """Makes the baselines presets."""
    register_family(", ".join(NAMES), find)


def find(name: str) -> Callable[..., dict[str, Any]] | None:
    """The preset of that name; None if there is no such baseline."""
    for baseline in _ALL:
        found = re.fullmatch(baseline.PATTERN, name)
        if found:
            return partial(_parts, name, baseline, [_number(text) for text in found.groups() if text])
    return None


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _parts(
    name: str,
    baseline: Any,
    numbers: list[int | float],
    model: Any,
    shape: ModelShape,
    fingerprint: str | None,
    target: Target,
) -> dict[str, Any]:
    if getattr(baseline, "TARGETED", False):
        made: dict[str, Any] = baseline.parts(model, shape, target, *numbers)
        return made
    if target.given:
        raise ConfigError(f"{name} holds the widths of its name; it takes no target")
    made = baseline.parts(model, shape, *numbers)
    return made
