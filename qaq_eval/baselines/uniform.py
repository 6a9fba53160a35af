"""Uniform: 2^b levels between the smallest and the largest number of a vector."""

from __future__ import annotations

from typing import Any

from qaq_core import Quantizer, Target
from qaq_core.allocation import FixedPolicy, NoStatistic
from qaq_core.models import ModelShape
from qaq_core.quantization import IdentityTransform, UniformCodec

NAME, PATTERN, TAKES_TARGET = "uniform-<bits>", r"uniform-(\d+)", False


def preset(model: Any, shape: ModelShape, target: Target, bits: int) -> dict[str, Any]:
    return {
        "quantizer": Quantizer(IdentityTransform(), UniformCodec("head")),
        "policy": FixedPolicy(bits, bits),
        "statistic": NoStatistic(),
    }
