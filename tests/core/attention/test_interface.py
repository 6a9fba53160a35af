"""Attention reaches the cache, or the call raises: before a wrong token is chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from qaq_core import ConfigError, QAQCache, UnsupportedModelError
from qaq_core.attention.interface import NewKeys, qaq_attention
from tests.core.tiny_models import KINDS, tiny, token_ids

KIND = "llama-gqa"
NOT_REACHED = "updated a QAQ cache, but its attention did not reach"


def logits(model: Any, ids: torch.Tensor, cache: Any, **arguments: Any) -> torch.Tensor:
    """Of a prompt of 20 tokens and, one by one, the rest."""
    with torch.no_grad():
        parts = [model(ids[:, :20], past_key_values=cache, **arguments).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache, **arguments).logits for i in range(20, ids.shape[1])]
    return torch.cat(parts, 1)


def generated(model: Any, cache: Any, new: int = 1) -> torch.Tensor:
    out: torch.Tensor = model.generate(token_ids(20), past_key_values=cache, max_new_tokens=new, do_sample=False)
    return out


def of_one_layer() -> Any:
    model = tiny(KIND)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def with_attention(monkeypatch: pytest.MonkeyPatch, attention: Callable[..., Any]) -> None:
    """Llama attends with that function in place of the one that is registered."""

    def get_interface(*_: Any) -> Callable[..., Any]:
        return attention

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", SimpleNamespace(get_interface=get_interface))


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "repeat": lambda keys: keys.repeat(1, 1, 1, 1),
    "add": lambda keys: keys + 0.0,
    "transpose": lambda keys: keys.transpose(2, 3).transpose(2, 3),
    "cat": lambda keys: torch.cat([keys[:, :1], keys[:, 1:]], 1),
    "expand": lambda keys: keys.expand(*keys.shape),
    "to another dtype": lambda keys: keys.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_keys_that_are_changed_raise(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(module: Any, query: Any, key: torch.Tensor, *others: Any, **arguments: Any) -> Any:
        return qaq_attention(module, query, CHANGES[change](key), *others, **arguments)

    model = of_one_layer()
    cache = QAQCache.for_model(model, preset="fp16")
    with_attention(monkeypatch, attention)
    with pytest.raises(UnsupportedModelError, match=f"layer 0 {NOT_REACHED}"):
        generated(model, cache)
    # The failure does not outlive the call.
    monkeypatch.undo()
    assert torch.isfinite(logits(model, token_ids(24), DynamicCache())).all()
    assert torch.equal(generated(model, cache, 5), generated(model, DynamicCache(), 5))


@pytest.mark.parametrize("copied", ["clone", "contiguous", "detach"])
def test_keys_that_are_copied_are_the_same_keys(copied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(module: Any, query: Any, key: torch.Tensor, *others: Any, **arguments: Any) -> Any:
        return qaq_attention(module, query, getattr(key, copied)(), *others, **arguments)

    model, ids = tiny(KIND), token_ids(24)
    expected = logits(model, ids, DynamicCache())
    cache = QAQCache.for_model(model, preset="fp16")
    with_attention(monkeypatch, attention)
    torch.testing.assert_close(logits(model, ids, cache), expected, atol=3e-3, rtol=3e-3)
    assert cache.get_seq_length() == 24


def test_values_that_are_changed_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(module: Any, query: Any, key: Any, value: torch.Tensor, *others: Any, **arguments: Any) -> Any:
        return qaq_attention(module, query, key, 2 * value, *others, **arguments)

    model = of_one_layer()
    cache = QAQCache.for_model(model, preset="fp16")
    with_attention(monkeypatch, attention)
    with pytest.raises(UnsupportedModelError, match=NOT_REACHED):
        generated(model, cache)


def test_a_layer_that_attends_twice_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(*given: Any, **arguments: Any) -> Any:
        qaq_attention(*given, **arguments)
        return qaq_attention(*given, **arguments)

    model = of_one_layer()
    cache = QAQCache.for_model(model, preset="fp16")
    with_attention(monkeypatch, attention)
    with pytest.raises(UnsupportedModelError, match=NOT_REACHED):
        generated(model, cache)


def test_new_keys_show_their_shape() -> None:
    cache = QAQCache.for_model(of_one_layer(), preset="fp16")
    keys, values = torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32)
    new, same = cache.update(keys, values, 0)
    assert isinstance(new, NewKeys)
    assert same is values
    assert (new.shape, new.dtype, new.device, new.dim(), new.size(2)) == (keys.shape, keys.dtype, keys.device, 4, 5)
    assert "NewKeys" in type(new.contiguous()).__name__
    with pytest.raises(UnsupportedModelError, match="matmul"):
        torch.matmul(new, values.mT)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [of_one_layer, lambda: tiny(KIND), lambda: tiny("gemma3"), lambda: tiny("opt")])
def test_another_attention_implementation_raises(make: Callable[[], Any], implementation: str) -> None:
    model = make()
    cache = QAQCache.for_model(model, preset="fp16")
    model.set_attn_implementation(implementation)
    with pytest.raises(UnsupportedModelError, match="switched to another attention implementation"):
        generated(model, cache)


def test_a_copy_of_the_model_raises() -> None:
    model = of_one_layer()
    other = copy.deepcopy(model)
    cache = QAQCache.for_model(model, preset="fp16")
    with pytest.raises(UnsupportedModelError, match="is a copy"):
        generated(other, cache)
    assert torch.equal(generated(model, cache, 4), generated(other, DynamicCache(), 4))


def test_an_update_whose_keys_nobody_used_raises_at_the_next_pass() -> None:
    model = of_one_layer()
    cache = QAQCache.for_model(model, preset="fp16")
    cache.update(torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32), 0)
    with pytest.raises(UnsupportedModelError, match=NOT_REACHED):
        generated(model, cache)


@pytest.mark.parametrize("layers", [2, 4])
def test_a_model_with_other_layers_raises(layers: int) -> None:
    cache = QAQCache.for_model(tiny(KIND), preset="fp16")
    config = copy.deepcopy(tiny(KIND).config)
    config.num_hidden_layers = layers
    other = type(tiny(KIND))(config).eval()
    other.set_attn_implementation("qaq")
    with pytest.raises(UnsupportedModelError, match=rf"3 layers.* {layers} layers"):
        generated(other, cache)


def test_a_model_of_another_architecture_raises() -> None:
    cache = QAQCache.for_model(tiny("mistral"), preset="fp16")
    other = tiny("qwen2")
    other.set_attn_implementation("qaq")
    with pytest.raises(UnsupportedModelError, match="a mistral model of 3 layers, and a qwen2 model"):
        generated(other, cache)


def test_a_model_with_other_heads_raises() -> None:
    model, ids = tiny(KIND), token_ids(24)
    cache = QAQCache.for_model(tiny(KIND), preset="fp16")
    model.config.num_key_value_heads *= 2
    other = type(model)(model.config).eval()
    other.set_attn_implementation("qaq")
    with pytest.raises(UnsupportedModelError, match="this cache was made for"):
        logits(other, ids, cache)


def test_a_model_that_was_moved_to_another_dtype_raises() -> None:
    model = tiny(KIND)
    cache = QAQCache.for_model(model, preset="fp16")
    model.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"a model in torch.float32, and the model computes in torch.bfloat16"):
        generated(model, cache)


def test_a_pass_that_was_broken_off_is_not_continued() -> None:
    model = tiny(KIND)
    cache = QAQCache.for_model(model, preset="fp16")
    expected = generated(model, DynamicCache(), 4)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generated(model, cache)
    handle.remove()
    with pytest.raises(UnsupportedModelError, match=r"ended after 1 of 3 layers.*reset"):
        generated(model, cache)
    cache.reset()
    assert torch.equal(generated(model, cache, 4), expected)


def test_dropout_raises() -> None:
    model = tiny(KIND).train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    cache = QAQCache.for_model(model, preset="fp16")
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"model\.eval"):
        model(token_ids(20), past_key_values=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_with_gradients_enabled_says_the_same(kind: str) -> None:
    model, ids = tiny(kind), token_ids(24)
    expected = logits(model, ids, DynamicCache())
    cache = QAQCache.for_model(model, preset="fp16")
    got = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([20, 1, 1, 1, 1], 1)], 1)
    torch.testing.assert_close(got.detach(), expected, atol=4e-3, rtol=4e-3)
    with pytest.raises(ConfigError, match="no gradients"):
        got.sum().backward()


def test_a_prompt_in_inference_mode_may_be_continued_outside() -> None:
    model, ids = tiny(KIND), token_ids(60)
    expected = logits(model, ids, DynamicCache())
    cache = QAQCache.for_model(model, preset="fp16")
    with torch.inference_mode():
        parts = [model(ids[:, :20], past_key_values=cache).logits, model(ids[:, 20:21], past_key_values=cache).logits]
    with torch.no_grad():
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(21, 60)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=4e-3, rtol=4e-3)


@pytest.mark.slow
def test_a_model_that_is_compiled_as_a_whole_says_so() -> None:
    torch._dynamo.reset()  # after too many compilations in this process it would be left as it is
    model = of_one_layer()
    cache = QAQCache.for_model(model, preset="fp16")
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(Exception, match=r"compiled as a whole by torch\.compile"):
        generated(model, cache)


def test_attention_probabilities_are_refused() -> None:
    """They were silently left out."""
    model = of_one_layer()
    cache = QAQCache.for_model(model, preset="fp16")
    asked = {"do_sample": False, "max_new_tokens": 2, "return_dict_in_generate": True}
    with pytest.raises(ConfigError, match="leave output_attentions unset"):
        model.generate(token_ids(20), past_key_values=cache, output_attentions=True, **asked)
    cache.reset()
    out = model.generate(token_ids(20), past_key_values=cache, output_hidden_states=True, **asked)
    assert out.attentions is None
    assert len(out.hidden_states) == 2
    cache.reset()
    model.config._output_attentions = True  # set before the model was switched to QAQ's attention
    with pytest.raises(ConfigError, match="leave output_attentions unset"):
        model.generate(token_ids(20), past_key_values=cache, **asked)
