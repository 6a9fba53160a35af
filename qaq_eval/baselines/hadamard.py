"""Hadamard: vectors are rotated by a Hadamard matrix without centering, then quantized as by `uniform`."""

from __future__ import annotations

from typing import Any

import torch

from qaq_core import Quantizer, Target
from qaq_core.models import ModelShape
from qaq_core.quantization import LinearTransform, UniformCodec, hadamard
from qaq_eval.baselines import uniform

NAME, PATTERN, TAKES_TARGET = "hadamard-<bits>", r"hadamard-(\d+)", False


def preset(model: Any, shape: ModelShape, target: Target, bits: int) -> dict[str, Any]:
    device = next(model.parameters()).device
    zero_mean = torch.zeros(shape.layers, shape.kv_heads, shape.head_dim, device=device)
    rotation = hadamard(shape.head_dim).float().to(device).expand(shape.layers, shape.kv_heads, -1, -1)
    transform = LinearTransform(
        rotation,
        rotation,
        zero_mean,
        zero_mean.clone(),
        shape.frequencies.to(device),
        torch.tensor(shape.kind, device=device),
    )
    return {**uniform.preset(model, shape, target, bits), "quantizer": Quantizer(transform, UniformCodec("head"))}
