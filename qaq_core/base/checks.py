"""Checks of settings: of the right type and in range, or a ConfigError that says what to give."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from qaq_core.base.errors import ConfigError


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number from `least` to `most`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
    return int(value)


def number(name: str, value: Any, least: float, most: float, *, above: bool = False, unit: str = "") -> float:
    """A number from `least`, or above it, to `most`."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not (least < value if above else least <= value) or value > most:
        limits = f"over {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
        raise ConfigError(f"{name} must be {limits}{unit}, not {value!r}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {value!r}")
    return value


def one_of(name: str, value: Any, options: Iterable[str]) -> str:
    """One of those names."""
    known = list(options)
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    return value
