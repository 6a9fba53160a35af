"""A model whose keys have large offsets in a few channels, as models with a bias on their keys have."""

from __future__ import annotations

import copy
from typing import Any

import torch

SLOW_PAIRS = 4
"""RoPE pairs, counted from the slowest, that get an offset: where trained biases are largest, and where positions
hardly turn it, so that attention hardly changes."""


def with_key_bias(model: Any, size: float) -> Any:
    """A copy of a Llama-style model whose `k_proj` adds ±`size` in the slowest channels of every head."""
    biased = copy.deepcopy(model)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    pairs = config.head_dim // 2
    for layer in biased.model.layers:
        plain = layer.self_attn.k_proj
        bias = torch.zeros(config.num_key_value_heads, 2, pairs)
        signs = torch.randint(0, 2, (config.num_key_value_heads, 2, SLOW_PAIRS), generator=generator) * 2 - 1
        bias[:, :, pairs - SLOW_PAIRS :] = size * signs
        linear = torch.nn.Linear(plain.in_features, plain.out_features, bias=True, dtype=plain.weight.dtype)
        linear.weight = plain.weight
        linear.bias = torch.nn.Parameter(bias.flatten().to(plain.weight.dtype), requires_grad=False)
        layer.self_attn.k_proj = linear
    return biased
