"""What of a model the cache needs to know, and which models it can serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qaq_core.base.errors import UnsupportedModelError


@dataclass(frozen=True)
class ModelShape:
    """Attention dimensions of a decoder.

    Attributes:
        frequencies: float64 [kinds, head_dim/2], RoPE angle per position and pair; zeros without RoPE.
        kind: which frequencies each layer uses.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    frequencies: torch.Tensor
    kind: tuple[int, ...]

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """Reads a transformers causal LM.

        Raises:
            UnsupportedModelError: its attention is of a kind that packed keys and values cannot serve.
        """
        config = model.config.get_text_config(decoder=True)
        name = type(model).__name__
        if not getattr(model, "_supports_attention_backend", False) and not getattr(model, "_supports_sdpa", False):
            raise UnsupportedModelError(f"{name} does not go through the transformers attention interface")
        if getattr(config, "kv_lora_rank", None) or getattr(config, "num_kv_shared_layers", 0):
            raise UnsupportedModelError(f"{name} stores latent or shared keys and values, which are not supported")
        if getattr(config, "attn_logit_softcapping", None):
            raise UnsupportedModelError(f"{name} caps its attention logits, which is not supported")
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not kinds <= {"full_attention", "sliding_attention"}:
            raise UnsupportedModelError(f"{name} has layers that are not softmax attention: {sorted(kinds)}")
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        if head_dim % 16:
            raise UnsupportedModelError(f"{name} has head_dim {head_dim}, which is not a multiple of 16")
        frequencies, kind = _frequencies(model, config, head_dim)
        return cls(
            layers=config.num_hidden_layers,
            query_heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            frequencies=frequencies,
            kind=kind,
        )


def _frequencies(model: Any, config: Any, head_dim: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """RoPE's frequencies per kind of layer, from the model's own rotary modules."""
    rotary = next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    layers = config.num_hidden_layers
    if rotary is None:
        return torch.zeros(1, head_dim // 2, dtype=torch.float64), (0,) * layers
    buffers = {key: value for key, value in rotary.named_buffers() if key.endswith("inv_freq")}
    types = getattr(config, "layer_types", None) or ["full_attention"] * layers
    if "inv_freq" in buffers:
        names = dict.fromkeys(set(types), "inv_freq")
    else:
        names = {kind: f"{kind}_inv_freq" for kind in set(types)}
    order = sorted(set(names.values()))
    for key in order:
        if key not in buffers or buffers[key].numel() * 2 != head_dim:
            raise UnsupportedModelError(
                f"{type(model).__name__} rotates only part of each head, or in a way that is not known here"
            )
    table = torch.stack([buffers[key].detach().double().cpu() for key in order])
    return table, tuple(order.index(names[kind]) for kind in types)
