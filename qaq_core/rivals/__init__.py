"""Rivals: what others do, through the same packed path and counted by the same bytes. One file per rival.

A rival is named by a pattern, such as `uniform-3`. Like a preset it says which frame, codec, policy and window
make up a method. All of them keep the sinks exact, as the presets do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from qaq_core.errors import ConfigError
from qaq_core.method import Target
from qaq_core.rivals import hadamard, kivi, split, uniform
from qaq_core.shape import ModelShape

_ALL = (uniform, hadamard, split, kivi)
NAMES = tuple(rival.NAME for rival in _ALL)


def find(name: str) -> Callable[..., dict[str, Any]] | None:
    """What makes the parts of that rival's method, see `presets.build`; None if there is no such rival."""
    for rival in _ALL:
        found = re.fullmatch(rival.PATTERN, name)
        if found:
            return partial(_parts, name, rival.parts, [int(width) for width in found.groups()])
    return None


def _parts(
    name: str,
    parts: Callable[..., dict[str, Any]],
    widths: list[int],
    model: Any,
    shape: ModelShape,
    fingerprint: str | None,
    target: Target,
) -> dict[str, Any]:
    if target.bits or target.compression:
        raise ConfigError(f"{name} holds the widths of its name; it takes no target")
    return parts(model, shape, *widths)
