"""What is read of a model, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from qaq_core.base.errors import UnsupportedModelError
from qaq_core.models.shape import ModelShape
from tests.core.tiny_models import capped, tiny

SMALL = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        ("llama-mha", (3, 4, 4, 16)),
        ("llama-gqa", (3, 4, 2, 32)),
        ("llama-mqa-80", (3, 4, 1, 80)),
        ("gemma3", (3, 4, 2, 256)),
        ("opt", (3, 4, 4, 16)),
    ],
)
def test_dimensions(kind: str, dims: tuple[int, int, int, int]) -> None:
    shape = ModelShape.of(tiny(kind))
    assert (shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim) == dims
    assert shape.frequencies.shape[1] == shape.head_dim // 2
    assert len(shape.kind) == shape.layers


def test_ropes_frequencies_by_hand() -> None:
    shape = ModelShape.of(tiny("llama-mha"))
    expected = [10_000 ** (-2 * i / 16) for i in range(8)]
    assert shape.frequencies[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_sliding_and_full_layers_have_frequencies_of_their_own() -> None:
    shape = ModelShape.of(tiny("gemma3"))
    assert len(shape.frequencies) == 2
    assert shape.kind[0] == shape.kind[1] != shape.kind[2]
    sliding, full = shape.frequencies[shape.kind[0]], shape.frequencies[shape.kind[2]]
    assert float(sliding[1]) == pytest.approx(10_000 ** (-2 / 256), rel=1e-5)
    assert float(full[1]) == pytest.approx(1_000_000 ** (-2 / 256), rel=1e-5)


def test_no_rope_is_no_rotation() -> None:
    assert not torch.any(ModelShape.of(tiny("opt")).frequencies)


def test_unsupported_models_are_refused_with_the_reason() -> None:
    odd = LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=12))
    partial = PhiForCausalLM(PhiConfig(**SMALL, partial_rotary_factor=0.5))
    for model, reason in ((capped(), "caps"), (odd, "head_dim 12"), (partial, "rotates only part")):
        with pytest.raises(UnsupportedModelError, match=reason):
            ModelShape.of(model)


def test_other_names_of_the_same_dimensions_are_read() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    shape = ModelShape.of(model)
    assert (shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim) == (2, 4, 4, 16)
