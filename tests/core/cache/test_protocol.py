"""What transformers does with a cache besides attending: assisted decoding, beams, copies, looking inside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qaq_core.attention import LayerTokens
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.passes import LONGEST_DRAFT
from qaq_core.cache.sequence import SequenceCache
from qaq_eval.baselines import h2o  # noqa: F401  (registers all of them as presets)
from tests.core.cache.test_cache import generated, padded
from tests.core.rows import normal
from tests.core.tiny_models import calibration, tiny, token_ids

KIND = "llama-gqa"


def cache_of(model: Any, preset: str = "fp16", **settings: Any) -> QAQCache:
    own = {} if preset != "balanced" else {"calibration": calibration(KIND), "target_bits": 3.0}
    return QAQCache.for_model(model, preset=preset, **own, **settings)


def repetitive(n: int) -> torch.Tensor:
    """Tokens with a phrase that comes again and again."""
    return token_ids(12).repeat(1, -(-n // 12))[:, :n]


@pytest.mark.parametrize("prompt", [9, 40, 75])
@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_prompt_lookup_decoding(prompt: int, tokens: int) -> None:
    model = tiny(KIND)
    inputs = padded([repetitive(prompt)])
    expected = generated(model, inputs, DynamicCache(), 60)
    cache = cache_of(model)
    assert torch.equal(generated(model, inputs, cache, 60, prompt_lookup_num_tokens=tokens), expected)
    sequence = cache.sequences[0]
    cache.crop(0)
    assert prompt + 59 <= sequence.length <= prompt + 60
    assert sequence.length == cache.get_seq_length() == sequence.staging.tokens
    assert len(sequence.packed) == ((sequence.length - 4) // 8 - 1) * 8


def test_assisted_decoding_with_another_model() -> None:
    model, assistant = tiny(KIND), tiny("llama-mha")
    inputs = padded([token_ids(50)])
    expected = generated(model, inputs, DynamicCache(), 40)
    for preset in ("fp16", "balanced"):
        cache = cache_of(model, preset)
        got = generated(model, inputs, cache, 40, assistant_model=assistant)
        assert got.shape == expected.shape
        if preset == "fp16":
            assert torch.equal(got, expected)


def test_plain_decoding_goes_on_after_assisted_decoding() -> None:
    """Assisted decoding itself needs an empty cache: transformers brings the whole text again, which is told."""
    model = tiny(KIND)
    cache, other = cache_of(model), DynamicCache()
    inputs = padded([repetitive(40)])
    got = generated(model, inputs, cache, 20, prompt_lookup_num_tokens=4)
    assert torch.equal(got, generated(model, inputs, other, 20))
    ids = torch.cat([repetitive(40), got, token_ids(5)], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ConfigError):
        generated(model, inputs, cache, 20, prompt_lookup_num_tokens=4)
    got = generated(model, inputs, cache, 20)
    assert torch.equal(got, generated(model, inputs, other, 20))
    ids = torch.cat([ids, got, token_ids(LONGEST_DRAFT)], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(generated(model, inputs, cache, 4), generated(model, inputs, other, 4))


@torch.no_grad()
def test_a_draft_that_is_not_cropped_counts() -> None:
    model = tiny(KIND)
    cache, other, ids = cache_of(model), cache_of(model), token_ids(90)
    cache.activate_past_recording()
    for first, last in ((0, 40), (40, 45), (45, 60)):
        model(ids[:, first:last], past_key_values=cache)
        keys = cache.layers[0].keys
        assert keys is not None
        assert keys.shape[2] == cache.get_seq_length() == last
        assert bool(keys[0, :, -1].any())
    model(ids[:, 60:62], past_key_values=cache)
    cache.settle()
    model(ids[:, :62], past_key_values=other)
    got, expected = (model(ids[:, 62:], past_key_values=each).logits for each in (cache, other))
    assert float((got - expected).abs().max()) < 2e-3


@pytest.mark.parametrize("beams", [2, 3])
def test_beam_search(beams: int) -> None:
    model = tiny(KIND)
    inputs = padded([token_ids(40), token_ids(25, seed=1)])
    expected = generated(model, inputs, DynamicCache(), 24, num_beams=beams)
    cache = cache_of(model)
    assert torch.equal(generated(model, inputs, cache, 24, num_beams=beams), expected)
    assert cache.batch_size == 2 * beams


@torch.no_grad()
def test_a_turn_that_was_edited() -> None:
    """The last columns of a padded batch are cropped, by number and by length, and others come."""
    model, prompts = tiny(KIND), [token_ids(60), token_ids(30, seed=1)]
    inputs, edited = padded(prompts), torch.cat([token_ids(9, seed=2), token_ids(9, seed=3)])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
    logits = []
    for cache, cut in ((cache_of(model), -11), (cache_of(model), 60), (DynamicCache(), -11)):
        generated(model, inputs, cache, 12)
        cache.crop(cut)
        assert cache.get_seq_length() == 60
        positions = torch.tensor([60, 30])[:, None] + torch.arange(9)
        logits.append(model(edited, past_key_values=cache, attention_mask=mask, position_ids=positions).logits)
        if isinstance(cache, QAQCache):
            assert [sequence.length for sequence in cache.sequences] == [69, 39]
            cache.crop(-50)
            assert [sequence.length for sequence in cache.sequences] == [19, 0]
            cache.crop(100)
            assert cache.get_seq_length() == 19
    assert float((logits[0] - logits[2]).abs().max()) < 2e-3
    assert float((logits[1] - logits[2]).abs().max()) < 2e-3


@torch.no_grad()
@pytest.mark.parametrize("preset", ["fp16", "balanced"])
def test_a_copy_goes_its_own_way(preset: str) -> None:
    model = tiny(KIND)
    prefix, cache = token_ids(70), cache_of(model, preset)
    model(prefix, past_key_values=cache)
    other = copy.deepcopy(cache)
    assert other.method is cache.method
    before = cache.stats()
    model(token_ids(30, seed=1), past_key_values=other)
    assert (cache.stats(), cache.get_seq_length(), other.get_seq_length()) == (before, 70, 100)
    one, two = (model(token_ids(4, seed=2), past_key_values=each).logits for each in (cache, copy.deepcopy(other)))
    assert not torch.equal(one, two)
    other.reset()
    assert cache.stats()[0].tokens == 74


@torch.no_grad()
def test_sequences_are_repeated_and_selected() -> None:
    model = tiny(KIND)
    prompts = [token_ids(40, seed=seed) for seed in range(3)]
    cache, dynamic = cache_of(model), DynamicCache()
    for each in (cache, dynamic):
        model(torch.cat(prompts), past_key_values=each)
        each.batch_repeat_interleave(2)
        each.batch_select_indices(torch.tensor([5, 0, 1, 0]))
    assert (cache.batch_size, cache.max_batch_size) == (4, 4)
    ids = token_ids(4).view(4, 1)
    got, expected = (model(ids, past_key_values=each).logits for each in (cache, dynamic))
    assert float((got - expected).abs().max()) < 2e-3
    assert len({id(sequence) for sequence in cache.sequences}) == 4
    cache.batch_select_indices(torch.tensor([False, True, False, True]))
    assert cache.batch_size == 2


@torch.no_grad()
def test_layers_show_what_is_held() -> None:
    model = tiny(KIND)
    cache, dynamic = cache_of(model), DynamicCache()
    assert cache.layers[0].keys is None
    assert not cache.layers[0].is_initialized
    inputs = padded([token_ids(60), token_ids(31, seed=1)])
    for each in (cache, dynamic):
        generated(model, inputs, each, 8)
    assert len(cache.layers) == len(cache) == len(dynamic.layers)
    for view, layer in zip(cache.layers, dynamic.layers, strict=True):
        assert (view.is_initialized, view.get_seq_length(), view.get_max_length()) == (True, 67, -1)
        for got, expected in ((view.keys, layer.keys), (view.values, layer.values)):
            assert got is not None
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            assert not bool(got[1, :, :29].any()), "padding"
            for sequence, first in ((0, 0), (1, 29)):
                error = (got[sequence, :, first:] - expected[sequence, :, first:]).norm()
                assert float(error / expected[sequence, :, first:].norm()) < 2e-3
    with pytest.raises(IndexError):
        cache.layers[3]
    with pytest.raises(ConfigError, match="as a whole"):
        cache.layers[0].update(torch.ones(1), torch.ones(1))


@torch.no_grad()
@pytest.mark.parametrize("preset", ["balanced", "paper", "fp16", "kivi-4"])
@pytest.mark.parametrize("kind", [KIND, "gemma3"])
def test_layers_show_what_attention_reads(kind: str, preset: str) -> None:
    model = tiny(kind)
    own = {"calibration": calibration(kind)} if preset in ("balanced", "paper") else {}
    cache = QAQCache.for_model(model, preset=preset, kernel="reference", **own)
    model(token_ids(80), past_key_values=cache)
    sequence, shape = cache.sequences[0], cache.method.shape
    assert len(sequence.packed) > 30
    for layer, view in enumerate(cache.layers):
        window = (sequence.residual.tokens(layer, side) for side in (KEY, VALUE))
        tokens = LayerTokens(layer, *window, cache.method.sinks, sequence.packed)
        query = normal(layer, shape.query_heads, 1, shape.head_dim)
        group = shape.query_heads // shape.kv_heads
        assert view.keys is not None
        assert view.values is not None
        keys, values = (held[0].float().repeat_interleave(group, 0) for held in (view.keys, view.values))
        expected = (0.3 * query @ keys.mT).softmax(-1) @ values
        got = cache.method.attention(query, tokens, 0.3)
        assert float((got - expected).abs().max()) < 2e-3 * float(expected.abs().max())


def test_what_a_cache_says_of_itself() -> None:
    model = tiny(KIND)
    cache = cache_of(model)
    assert (cache.batch_size, cache.max_cache_len, cache.is_croppable) == (-1, -1, True)
    generated(model, padded([token_ids(30)] * 2), cache, 3)
    assert repr(cache) == f"QAQCache(preset='fp16', layers=3, batch_size=2, tokens=32, nbytes={cache.nbytes})"
    assert repr(cache.layers[2]) == "LayerView(2: 32 tokens)"


@torch.no_grad()
def test_a_cache_that_evicts_says_that_it_cannot() -> None:
    model = tiny(KIND)
    cache = QAQCache.for_model(model, preset="h2o-0.5")
    model(token_ids(40), past_key_values=cache)
    assert not cache.is_croppable
    with pytest.raises(ConfigError, match="cannot be cropped"):
        cache.crop(-3)
    with pytest.raises(ConfigError, match="evicts"):
        _ = cache.layers[0].keys
    with pytest.raises(ConfigError, match="refuse"):
        cache.sequences[0].expect_draft(3)
    assert isinstance(cache.sequences[0], SequenceCache)
