"""Baselines: published methods, run through the same packed path and counted by the same bytes. One file each.

The name of a baseline follows a pattern, such as `uniform-3`. Like a preset, a baseline returns the arguments of a
`Method`, and may take settings. Baselines that quantize keep the sinks in half precision, as the presets do. Baselines
that evict hold the kept tokens in half precision. Importing this package registers the baselines as a family of
presets.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from qaq_core import ConfigError, Target, register_family
from qaq_core.models import ModelShape
from qaq_eval.baselines import h2o, hadamard, kivi, kvarn, oscar, scissorhands, split, turboquant, uniform

_ALL: tuple[Any, ...] = (uniform, hadamard, split, kivi, oscar, kvarn, turboquant, h2o, scissorhands)
NAMES = tuple(baseline.NAME for baseline in _ALL)


def find_baseline(name: str) -> Callable[..., dict[str, Any]] | None:
    """The preset of a baseline; None if there is no such baseline."""
    for baseline in _ALL:
        match = re.fullmatch(baseline.PATTERN, name)
        if match:
            return partial(_preset, name, baseline, [_number(text) for text in match.groups() if text])
    return None


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _preset(
    name: str,
    baseline: Any,
    numbers: list[int | float],
    model: Any,
    shape: ModelShape,
    fingerprint: str | None,
    target: Target,
    **settings: Any,
) -> dict[str, Any]:
    if target.given and not baseline.TAKES_TARGET:
        raise ConfigError(f"{name} has the widths of its name; it takes no target")
    try:
        inspect.signature(baseline.preset).bind(model, shape, target, *numbers, **settings)
    except TypeError as error:
        raise ConfigError(f"{name} does not take these settings: {error}") from error
    arguments: dict[str, Any] = baseline.preset(model, shape, target, *numbers, **settings)
    return arguments


register_family(", ".join(NAMES), find_baseline)
