"""Compiled layers decode as those of transformers do."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from transformers import DynamicCache

from qaq_core import QAQCache
from qaq_core.base.errors import ConfigError, UnsupportedModelError
from qaq_core.models.compiled import compile_layers
from qaq_core.models.linear import pack
from tests.core.tiny_models import tiny, token_ids

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"),
]


@torch.inference_mode()
def decoded(model, ids: torch.Tensor, cache, prompt: int) -> torch.Tensor:
    """Logits of every step."""
    rows = [model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1).logits]
    for at in range(prompt, ids.shape[1]):
        positions = torch.full((len(ids), 1), at)
        step = model(ids[:, at : at + 1], position_ids=positions, past_key_values=cache, use_cache=True)
        rows.append(step.logits)
    return torch.cat(rows, 1)


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3"])
def test_steps_give_the_same_with_and_without(kind: str) -> None:
    plain, compiled, ids = tiny(kind), tiny(kind), token_ids(60)
    compile_layers(compiled)
    for batch in (ids, torch.cat([ids, ids.roll(1), ids.roll(2)])):
        want, got = (decoded(m, batch, QAQCache.for_model(m, preset="fp16"), 40) for m in (plain, compiled))
        assert torch.allclose(want, got, atol=1e-4)
        want, got = (decoded(m, batch, DynamicCache(), 40) for m in (plain, compiled))
        assert torch.equal(want, got)


def test_packed_weights_are_compiled_too() -> None:
    model, ids = tiny("llama-gqa"), token_ids(48)
    pack(model, "float32")
    want = decoded(model, ids, QAQCache.for_model(model, preset="fp16"), 40)
    compile_layers(model)
    got = decoded(model, ids, QAQCache.for_model(model, preset="fp16"), 40)
    assert torch.allclose(want, got, atol=1e-4)


def test_several_models_of_one_kind_can_be_compiled() -> None:
    ids = token_ids(44)
    for nth in range(1, 6):
        model = tiny("llama-gqa")
        del model.model.layers[1:]
        model.config.num_hidden_layers = 1
        model.model.layers[0].input_layernorm.variance_epsilon = nth * 1e-6
        want = decoded(model, ids, QAQCache.for_model(model, preset="fp16"), 40)
        compile_layers(model)
        got = decoded(model, ids, QAQCache.for_model(model, preset="fp16"), 40)
        assert torch.allclose(want, got, atol=1e-4)


def test_a_model_without_known_layers_is_refused() -> None:
    model = tiny("llama-gqa")
    model._no_split_modules = []
    with pytest.raises(UnsupportedModelError, match="does not tell"):
        compile_layers(model)


def test_a_compiler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler"):
        compile_layers(tiny("llama-gqa"))
