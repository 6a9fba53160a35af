"""Checks of single fields of a request, which raise InvalidArgument with the field's name and its range."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from qaq.v1 import common_pb2

from services.common.errors import InvalidArgument


def one(name: str, values: Iterable[str]) -> str:
    """The value of a header, or of a piece of metadata, that may be sent once; "" if it was not sent.

    Raises:
        InvalidArgument: it was sent with different values. Whom a call is from must not depend on who reads it.
    """
    found = {*values}
    if len(found) > 1:
        raise InvalidArgument(f"{name} has {len(found)} different values; send one")
    return found.pop() if found else ""


def token_ids(field: str, ids: Iterable[int], vocabulary: int) -> None:
    """Checks that the model has these tokens."""
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise InvalidArgument(f"{field} names token {wrong}; the model's tokens are 0 to {vocabulary - 1}")


def number(
    params: common_pb2.SamplingParams | common_pb2.CacheParams,
    group: str,
    field: str,
    low: float,
    high: float,
    *,
    open_low: bool = False,
) -> None:
    """Checks that a field, if it is set, is finite and in [low, high], or in (low, high] if `open_low`."""
    if not params.HasField(field):
        return
    value = getattr(params, field)
    low, high = (float(np.float32(bound)) for bound in (low, high))  # as the message holds them
    if math.isfinite(value) and low <= value <= high and not (open_low and value == low):
        return
    above = f"above {low:g}" if open_low else f"at least {low:g}"
    raise InvalidArgument(f"{group}.{field} is {value:g}; send a number {above} and at most {high:g}")
