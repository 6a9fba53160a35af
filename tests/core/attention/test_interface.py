"""Attention reaches the cache, or the call raises."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from qaq_core import QAQCache, UnsupportedModelError
from qaq_core.attention.interface import qaq_attention
from tests.core.tiny_models import tiny, token_ids

KIND = "llama-gqa"


def logits(model: Any, ids: torch.Tensor, cache: Any, **arguments: Any) -> torch.Tensor:
    """Of a prompt of 20 tokens and, one by one, the rest."""
    with torch.no_grad():
        parts = [model(ids[:, :20], past_key_values=cache, **arguments).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache, **arguments).logits for i in range(20, ids.shape[1])]
    return torch.cat(parts, 1)


@pytest.fixture
def keys_are_cloned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's attention gets a copy of the keys that `update` returned."""

    def attention(module: Any, query: Any, key: torch.Tensor, *others: Any, **arguments: Any) -> Any:
        return qaq_attention(module, query, key.clone(), *others, **arguments)

    def get_interface(*_: Any) -> Callable[..., Any]:
        return attention

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", SimpleNamespace(get_interface=get_interface))


@pytest.mark.usefixtures("keys_are_cloned")
def test_keys_that_lost_their_mark_raise() -> None:
    model, ids = tiny(KIND), token_ids(24)
    cache = QAQCache.for_model(model, preset="fp16")
    with pytest.raises(UnsupportedModelError, match="layer 0 updated a QAQ cache, but its attention did not reach"):
        logits(model, ids, cache)
    # The failure does not outlive the call.
    assert torch.isfinite(logits(model, ids, DynamicCache())).all()


@pytest.mark.usefixtures("keys_are_cloned")
def test_a_cache_that_is_passed_to_attention_needs_no_mark() -> None:
    model, ids = tiny(KIND), token_ids(24)
    cache = QAQCache.for_model(model, preset="fp16")
    got = logits(model, ids, cache, qaq_cache=cache)
    torch.testing.assert_close(got, logits(model, ids, DynamicCache()), atol=3e-3, rtol=3e-3)
    assert cache.get_seq_length() == 24


def test_another_attention_implementation_raises() -> None:
    model, ids = tiny(KIND), token_ids(24)
    cache = QAQCache.for_model(model, preset="fp16")
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match="another attention implementation"):
        logits(model, ids, cache)


def test_a_model_of_one_layer_raises_at_its_second_step() -> None:
    model, ids = tiny(KIND), token_ids(24)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    cache = QAQCache.for_model(model, preset="fp16")
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="did not reach the cache"):
        logits(model, ids, cache)


def test_the_cache_of_another_model_raises() -> None:
    model, ids = tiny(KIND), token_ids(24)
    cache = QAQCache.for_model(tiny(KIND), preset="fp16")
    model.config.num_key_value_heads *= 2
    other = type(model)(model.config).eval()
    other.set_attn_implementation("qaq")
    with pytest.raises(UnsupportedModelError, match="this cache was made for"):
        logits(other, ids, cache)
