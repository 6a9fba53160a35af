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
    rotation = hadamard(shape.head_dim)
    quantizer = Quantizer(linear(model, shape, rotation, rotation), UniformCodec("head"))
    return {**uniform.preset(model, shape, target, bits), "quantizer": quantizer}


def linear(model: Any, shape: ModelShape, keys: torch.Tensor, values: torch.Tensor) -> LinearTransform:
    """The transform that multiplies keys and values with matrices, without centering.

    Args:
        keys, values: [head_dim, head_dim], or of each layer [layers, 1, head_dim, head_dim].
    """
    device = next(model.parameters()).device
    dims = (shape.layers, shape.kv_heads, shape.head_dim)
    key_matrix, value_matrix = (matrix.float().to(device).expand(*dims, -1) for matrix in (keys, values))
    zero_mean = torch.zeros(dims, device=device)
    return LinearTransform(
        key_matrix,
        value_matrix,
        zero_mean,
        zero_mean.clone(),
        shape.frequencies.to(device),
        torch.tensor(shape.kind, device=device),
    )
