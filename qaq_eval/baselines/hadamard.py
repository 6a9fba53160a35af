"""Rotated by a Hadamard matrix, not centered, then as `uniform`."""

from __future__ import annotations

from typing import Any

import torch

from qaq_core import Quantizer
from qaq_core.models import ModelShape
from qaq_core.quantization import LinearTransform, UniformCodec, hadamard
from qaq_eval.baselines import uniform

NAME, PATTERN = "hadamard-<bits>", r"hadamard-(\d+)"


def parts(model: Any, shape: ModelShape, bits: int) -> dict[str, Any]:
    device = next(model.parameters()).device
    no_mean = torch.zeros(shape.layers, shape.kv_heads, shape.head_dim, device=device)
    rotation = hadamard(shape.head_dim).float().to(device).expand(shape.layers, shape.kv_heads, -1, -1)
    transform = LinearTransform(
        rotation,
        rotation,
        no_mean,
        no_mean.clone(),
        shape.frequencies.to(device),
        torch.tensor(shape.kind, device=device),
    )
    return {**uniform.parts(model, shape, bits), "quantizer": Quantizer(transform, UniformCodec("head"))}
