"""Uniform: every vector in 2^b equal cells between its smallest and largest number."""

from __future__ import annotations

from typing import Any

from qaq_core.codecs import UniformCodec
from qaq_core.frames import PlainFrame
from qaq_core.policies import FixedPolicy
from qaq_core.quantizer import Quantizer
from qaq_core.rivals.blind import NoWindow
from qaq_core.shape import ModelShape

NAME, PATTERN = "uniform-<bits>", r"uniform-(\d+)"


def parts(model: Any, shape: ModelShape, bits: int) -> dict[str, Any]:
    return {
        "quantizer": Quantizer(PlainFrame(), UniformCodec("head")),
        "policy": FixedPolicy(bits, bits),
        "window": NoWindow(),
    }
