"""Uniform: every vector in 2^b equal cells between its smallest and largest number."""

from __future__ import annotations

from typing import Any

from qaq_core.allocation.policies import FixedPolicy
from qaq_core.models.shape import ModelShape
from qaq_core.quantization.codecs import UniformCodec
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform
from qaq_eval.baselines.no_statistic import NoStatistic

NAME, PATTERN = "uniform-<bits>", r"uniform-(\d+)"


def parts(model: Any, shape: ModelShape, bits: int) -> dict[str, Any]:
    return {
        "quantizer": Quantizer(IdentityTransform(), UniformCodec("head")),
        "policy": FixedPolicy(bits, bits),
        "statistic": NoStatistic(),
    }
