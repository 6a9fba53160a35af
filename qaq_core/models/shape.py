"""What of a model the cache needs to know, and which models it can serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from qaq_core.base.errors import ConfigError, UnsupportedModelError

OWN_ATTENTION = {
    "diffllama": "attends twice in a layer, to halves of its values",
    "falcon": "attends with code of its own, whatever attention it is told to use",
    "jetmoe": "repeats its keys after the cache returned them",
    "moshi": "has a sliding window that only the cache of transformers knows of",
}
"""What classes do that look as if they used transformers' attention. Others are found at the first forward pass."""


@dataclass(frozen=True)
class ModelShape:
    """Attention dimensions of a decoder.

    Attributes:
        model_type: transformers' name of the architecture.
        frequencies: float64 [kinds, head_dim/2], RoPE angle per position and pair; zeros without RoPE.
        kind: which frequencies each layer uses.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    frequencies: torch.Tensor
    kind: tuple[int, ...]
    model_type: str = ""

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """Reads a transformers causal LM.

        Raises:
            ConfigError: it is no model.
            UnsupportedModelError: its attention is of a kind that packed keys and values cannot serve.
        """
        check_causal_lm(model)
        config = model.config.get_text_config(decoder=True)
        name = type(model).__name__
        if config.model_type in OWN_ATTENTION:
            raise UnsupportedModelError(f"{name} {OWN_ATTENTION[config.model_type]}, which is not supported")
        if _value(config, "kv_lora_rank") or _value(config, "num_kv_shared_layers"):
            raise UnsupportedModelError(f"{name} stores latent or shared keys and values, which are not supported")
        if _value(config, "attn_logit_softcapping"):
            raise UnsupportedModelError(f"{name} caps its attention logits, which is not supported")
        if any(key.rpartition(".")[2] == "sinks" for key, _ in model.named_parameters()):
            raise UnsupportedModelError(f"{name} has learned attention sinks, which are not supported")
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not kinds <= {"full_attention", "sliding_attention"}:
            raise UnsupportedModelError(f"{name} has layers that are not softmax attention: {sorted(kinds)}")
        heads = _value(config, "decoder_attention_heads") or _value(config, "num_attention_heads")
        size = _value(config, "hidden_size")
        if not heads or not size or not getattr(config, "num_hidden_layers", None):
            raise UnsupportedModelError(f"{name} does not say how many layers and heads it has")
        head_dim = _value(config, "head_dim") or size // heads
        if head_dim % 16:
            raise UnsupportedModelError(f"{name} has head_dim {head_dim}, which is not a multiple of 16")
        frequencies, kind = _frequencies(model, config, head_dim)
        return cls(
            layers=layers_of(config),
            query_heads=heads,
            kv_heads=_value(config, "num_key_value_heads") or heads,
            head_dim=head_dim,
            frequencies=frequencies,
            kind=kind,
            model_type=config.model_type,
        )


def layers_of(config: Any) -> int:
    """Decoder layers; `num_hidden_layers` are the encoder's in configurations that have both."""
    return int(getattr(config, "decoder_layers", None) or config.num_hidden_layers)


def check_causal_lm(model: Any) -> None:
    """Refuses what is no causal language model of transformers, with what to give in its place.

    Raises:
        ConfigError, UnsupportedModelError
    """
    name = type(model).__name__
    if isinstance(model, str | PurePath):
        raise ConfigError(
            f"a model that is loaded is needed, not its name {str(model)!r}: give "
            f"qaq_core.models.load_model({str(model)!r}).model, or AutoModelForCausalLM.from_pretrained(...)"
        )
    if isinstance(getattr(model, "model", None), nn.Module) and not isinstance(model, nn.Module):
        raise ConfigError(f"the model itself is needed, not the {name} that holds it: give its attribute model")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a transformers causal language model is needed, not {model!r:.80}")
    config: Any = getattr(model, "config", None)
    can_generate: Any = getattr(model, "can_generate", None)
    if not hasattr(config, "get_text_config") or can_generate is None:
        raise UnsupportedModelError(f"{name} is no model of transformers; give what AutoModelForCausalLM loads")
    if not can_generate():
        raise UnsupportedModelError(f"{name} does not generate text; load the weights with AutoModelForCausalLM")
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name} has an encoder or cross-attention; a QAQ cache is for decoders alone")
    if not getattr(model, "_supports_attention_backend", False) and not getattr(model, "_supports_sdpa", False):
        raise UnsupportedModelError(f"{name} does not go through the transformers attention interface")
    layers = [module for module in model.modules() if getattr(module, "layer_idx", None) is not None]
    ways = {module.is_causal for module in layers if isinstance(getattr(module, "is_causal", None), bool)}
    both_ways = getattr(text, "use_bidirectional_attention", None) in (True, "all")
    if both_ways or not getattr(text, "is_causal", True) or ways == {False}:
        raise UnsupportedModelError(
            f"{name} attends in both directions, as an encoder does; a QAQ cache is for causal attention (for models "
            "like BERT, set is_decoder=True in the configuration)"
        )


def _value(config: Any, name: str) -> Any:
    """A number of the configuration that all layers share, or None.

    Raises:
        UnsupportedModelError: layers differ in it.
    """
    if name not in (getattr(config, "per_layer_attributes", None) or ()):
        return getattr(config, name, None)
    values = {getattr(layer, name, None) for layer in config.per_layer_config}
    if len(values) > 1:
        raise UnsupportedModelError(
            f"layers that differ in {name} are not supported: there are {sorted(values, key=str)}"
        )
    return values.pop()


def _frequencies(model: Any, config: Any, head_dim: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """RoPE's frequencies per kind of layer, from the model's own rotary modules."""
    rotary = next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    layers = layers_of(config)
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
