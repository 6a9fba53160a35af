"""Limits of views of a cache and of the price of its bits, which the router checks, and the worker too."""

from __future__ import annotations

import math

from qaq.v1 import inspect_pb2

from services.common.errors import InvalidArgument

MAX_TOKENS, TOKENS = 4096, 1024
MAX_COLUMNS, COLUMNS = 256, 64
MAX_FLOOR = 1e6
MIN_BITS, MAX_BITS = 0.25, 16.0
MIN_BUDGET = 1 << 20
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.25, 60.0
SHADOW_INTERVAL_S = 10.0
"""Between two looks at a session that is compared with full precision, at most: after it nobody looks any more."""

Precision = inspect_pb2.SetPrecisionRequest | inspect_pb2.SetFloorRequest


def options(given: inspect_pb2.ViewOptions) -> tuple[int, int]:
    """Tokens and columns that a view may have.

    Raises:
        InvalidArgument: one is out of range.
    """
    for name, most in (("tokens", MAX_TOKENS), ("columns", MAX_COLUMNS)):
        if not 0 <= getattr(given, name) <= most:
            raise InvalidArgument(f"{name} is {getattr(given, name)}; send 1 to {most}")
    return given.tokens or TOKENS, given.columns or COLUMNS


def interval(seconds: float, *, shadow: bool = False) -> float:
    """Seconds between two reports.

    Args:
        shadow: the session is compared with full precision.
    Raises:
        InvalidArgument: they are out of range.
    """
    if seconds == 0:
        return MIN_INTERVAL_S
    most = SHADOW_INTERVAL_S if shadow else MAX_INTERVAL_S
    if not MIN_INTERVAL_S <= seconds <= most:
        raise InvalidArgument(f"interval_s is {seconds:g}; send {MIN_INTERVAL_S:g} to {most:g}")
    return seconds


def check(request: Precision) -> None:
    """Raises:
    InvalidArgument: a floor or a number of bits is out of range.
    """
    if request.HasField("lambda_floor"):
        floor(request.lambda_floor)
    elif request.HasField("target_bits") and not MIN_BITS <= request.target_bits <= MAX_BITS:
        raise InvalidArgument(f"target_bits is {request.target_bits:g}; send {MIN_BITS:g} to {MAX_BITS:g}")


def floor(value: float) -> None:
    """Raises:
    InvalidArgument: a floor of λ is out of range.
    """
    if not (math.isfinite(value) and 0 <= value <= MAX_FLOOR):
        raise InvalidArgument(f"lambda_floor is {value:g}; send 0 to {MAX_FLOOR:g}")


def budget(kv_bytes: int) -> None:
    """Raises:
    InvalidArgument: a worker's budget is out of range.
    """
    if kv_bytes and not MIN_BUDGET <= kv_bytes < 1 << 62:
        raise InvalidArgument(f"kv_budget_bytes is {kv_bytes}; send at least {MIN_BUDGET}, or 0 for the setting's")
