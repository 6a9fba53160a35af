"""Rivals: what others do, through the same packed path and counted by the same bytes. One file per rival.

A rival is named by a pattern, such as `uniform-3`. Like a preset it says which frame, codec, policy and window
make up a method. Those that quantize keep the sinks exact, as the presets do; those that evict hold what they
keep in half precision.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from qaq_core.errors import ConfigError
from qaq_core.method import Target
from qaq_core.rivals import h2o, hadamard, kivi, scissorhands, split, uniform
from qaq_core.shape import ModelShape

_ALL: tuple[Any, ...] = (uniform, hadamard, split, kivi, h2o, scissorhands)
NAMES = tuple(rival.NAME for rival in _ALL)


def find(name: str) -> Callable[..., dict[str, Any]] | None:
    """What makes the parts of that rival's method, see `presets.build`; None if there is no such rival."""
    for rival in _ALL:
        found = re.fullmatch(rival.PATTERN, name)
        if found:
            return partial(_parts, name, rival, [_number(text) for text in found.groups() if text])
    return None


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _parts(
    name: str,
    rival: Any,
    numbers: list[int | float],
    model: Any,
    shape: ModelShape,
    fingerprint: str | None,
    target: Target,
) -> dict[str, Any]:
    if getattr(rival, "TARGETED", False):
        made: dict[str, Any] = rival.parts(model, shape, target, *numbers)
        return made
    if target.given:
        raise ConfigError(f"{name} holds the widths of its name; it takes no target")
    made = rival.parts(model, shape, *numbers)
    return made
