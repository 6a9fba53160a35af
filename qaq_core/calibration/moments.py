"""What calibration sees in the text a model samples: moments of keys and values, norms of queries."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qaq_core.base.rope import rotate_pairs
from qaq_core.models.shape import ModelShape

SINKS = 4
"""First tokens of a text, which are like no others and stay exact."""


def moments(shape: ModelShape, cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of keys before RoPE and of values; covariances of what centering each text on its own means leaves. Both
    are of the tokens from SINKS on.

    Args:
        cache: keys after RoPE and values of the sampled text.
    Returns:
        [2, layers, kv_heads, head_dim]; [2, layers, kv_heads, head_dim, head_dim]; both float64.
    """
    means: list[torch.Tensor] = []
    covariances: list[torch.Tensor] = []
    for layer, held in enumerate(cache.layers):
        keys, values = held.keys.transpose(0, 1).double(), held.values.transpose(0, 1).double()  # heads first
        angles = torch.arange(keys.shape[2], device=keys.device, dtype=torch.float64)[:, None]
        angles = angles * shape.frequencies[shape.kind[layer]].to(keys.device)
        cos, sin = angles.cos(), angles.sin()
        plain = rotate_pairs(keys, torch.cat([cos, -sin], -1))
        plain_rest, values_rest = plain[:, :, SINKS:], values[:, :, SINKS:]
        own = plain_rest.mean(2, keepdim=True), values_rest.mean(2, keepdim=True)
        centers = (rotate_pairs(own[0], torch.cat([cos, sin], -1)), own[1])
        for side, center in zip((keys, values), centers, strict=True):
            rows = (side - center)[:, :, SINKS:].flatten(1, 2)
            covariances.append(rows.mT @ rows / rows.shape[1])
        means.extend((plain_rest.mean((1, 2)), values_rest.mean((1, 2))))
    return _by_side(means), _by_side(covariances)


def _by_side(tables: list[torch.Tensor]) -> torch.Tensor:
    """Keys' and values' tables of layer after layer as [2, layers, …]."""
    return torch.stack([torch.stack(tables[0::2]), torch.stack(tables[1::2])])


class QueryNorms:
    """Collects ‖q‖² of every KV head's queries, as attention sees them."""

    def __init__(self, model: Any, shape: ModelShape) -> None:
        self._model, self._shape = model, shape
        self._norms: list[list[torch.Tensor]] = [[] for _ in range(shape.layers)]

    @property
    def norm(self) -> torch.Tensor:
        """Upper 10% quantile, float32 [layers, kv_heads]."""
        return torch.stack([torch.cat(part, -1).quantile(0.9, dim=-1) for part in self._norms]).float()

    def __enter__(self) -> QueryNorms:
        norms, heads = self._norms, self._shape.kv_heads

        def watching(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            squared = query.detach().float().square().sum(-1)  # [sequences, query heads, tokens]
            norms[module.layer_idx].append(squared.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1))
            return sdpa_attention_forward(module, query, *args, **kwargs)

        AttentionInterface.register("qaq-calibration", watching)
        AttentionMaskInterface.register("qaq-calibration", sdpa_mask)
        self._model.set_attn_implementation("qaq-calibration")
        return self

    def __exit__(self, *exc: object) -> None:
        self._model.set_attn_implementation("sdpa")
