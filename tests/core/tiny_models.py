"""Tiny models with random weights, of every supported kind, and how they are run."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qaq_core.calibration import Calibration, measure
from qaq_core.models.shape import ModelShape

VOCABULARY = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Larger weights than usual, so that attention looks at something; not so large that rounding explodes.
    "initializer_range": 0.1,
}

KINDS: dict[str, Any] = {
    "llama-mha": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON, num_key_value_heads=4)),
    "llama-gqa": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON, num_key_value_heads=2, head_dim=32)),
    "llama-mqa-80": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON, num_key_value_heads=1, head_dim=80)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_COMMON, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_COMMON, num_key_value_heads=2, sliding_window=None)),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**_COMMON, num_key_value_heads=2, sliding_window=24)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_COMMON,
            num_key_value_heads=2,
            head_dim=256,
            sliding_window=24,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            query_pre_attn_scalar=256,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **{k: v for k, v in _COMMON.items() if k not in ("intermediate_size", "initializer_range")},
            ffn_dim=96,
            word_embed_proj_dim=64,
            init_std=0.1,
        )
    ),
}

ALIKE: dict[str, Any] = {
    "llama-64": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON, num_key_value_heads=2, head_dim=64)),
}
"""Of a kind that is among KINDS, with heads that CUDA kernels take."""

SLIDING = ("mistral-sliding", "gemma3")


def tiny(kind: str) -> Any:
    """A fresh model; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (KINDS | ALIKE)[kind]().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at first: make the QKV bias matter
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def capped() -> Any:
    """A model that caps its attention logits, which is not supported."""
    return Gemma2ForCausalLM(Gemma2Config(**_COMMON, num_key_value_heads=2, head_dim=16))


@cache
def calibration(kind: str) -> Calibration:
    """A quick measurement of a tiny model."""
    model = tiny(kind)
    return measure(model, ModelShape.of(model), sequences=2, tokens=32)


def first_layers(kind: str, layers: int) -> tuple[Any, Calibration]:
    """A tiny model without its last layers, and the measurement of those that it has."""
    model = tiny(kind)
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    return model, Calibration(**{name: table[:layers].clone() for name, table in calibration(kind).tables.items()})


def token_ids(n: int, seed: int = 0) -> torch.Tensor:
    """[1, n] without the special tokens."""
    return torch.randint(3, VOCABULARY, (1, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def teacher_forced(model: Any, ids: torch.Tensor, prompt: int, past: Any = None) -> torch.Tensor:
    """Logits [n - prompt + 1, vocabulary] of a prompt's last token and of each that follows, one at a time."""
    past = past if past is not None else DynamicCache()
    logits = [model(ids[:, :prompt], past_key_values=past, use_cache=True).logits[0, -1]]
    for i in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, i : i + 1], past_key_values=past, use_cache=True).logits[0, -1])
    return torch.stack(logits)
