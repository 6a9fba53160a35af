"""More bits for keys than for values (arXiv 2502.15075: k4v2), otherwise as `uniform`."""

from __future__ import annotations

from typing import Any

from qaq_core import Target
from qaq_core.allocation import FixedPolicy
from qaq_core.models import ModelShape
from qaq_eval.baselines import uniform

NAME, PATTERN, TAKES_TARGET = "k<bits>v<bits>", r"k(\d+)v(\d+)", False


def preset(model: Any, shape: ModelShape, target: Target, key_bits: int, value_bits: int) -> dict[str, Any]:
    return {**uniform.preset(model, shape, target, 8), "policy": FixedPolicy(key_bits, value_bits)}
