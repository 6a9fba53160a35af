"""Uniform: every vector in 2^b equal cells between its smallest and largest number."""

from __future__ import annotations

from typing import Any

from qaq_core import Quantizer
from qaq_core.allocation import FixedPolicy, NoStatistic
from qaq_core.models import ModelShape
from qaq_core.quantization import IdentityTransform, UniformCodec

NAME, PATTERN = "uniform-<bits>", r"uniform-(\d+)"


def parts(model: Any, shape: ModelShape, bits: int) -> dict[str, Any]:
    return {
        "quantizer": Quantizer(IdentityTransform(), UniformCodec("head")),
        "policy": FixedPolicy(bits, bits),
        "statistic": NoStatistic(),
    }
