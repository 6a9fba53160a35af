"""`QAQCache` in transformers' own `generate`."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.kernels import library as native
from qaq_core.models import LoadedModel
from tests.core.tiny_models import calibration, tiny, token_ids

TEXT = (
    "The Python interpreter reads a program line by line. A line that ends in a backslash is joined with the "
    "one that follows it. Comments begin with a hash and are left out. Indentation tells which statements belong "
    "together, and a mix of tabs and spaces that could be read in two ways is an error."
)


@pytest.fixture(scope="module")
def smollm2(shallow_smollm2: LoadedModel) -> LoadedModel:
    """The demo model's first layers, for what does not depend on what the text says."""
    return shallow_smollm2


def generated(model: Any, inputs: Any, cache: QAQCache | None, new: int = 12, **settings: Any) -> torch.Tensor:
    settings = {"do_sample": False, **settings}
    out: torch.Tensor = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **settings
    )
    return out[:, inputs["input_ids"].shape[1] :]


def test_greedy_text_is_that_of_the_dynamic_cache(smollm2: LoadedModel) -> None:
    inputs = smollm2.tokenizer(TEXT, return_tensors="pt")
    expected = generated(smollm2.model, inputs, None, new=24)
    cache = QAQCache.for_model(smollm2.model, preset="fp16")
    assert torch.equal(generated(smollm2.model, inputs, cache, new=24), expected)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 23
    assert len(cache.sequences[0].packed) > 16


def test_the_kernel_changes_speed_only(smollm2: LoadedModel) -> None:
    """The demo's question about the beginning of its text: the same greedy answer from either kernel."""
    if native.load_library() is None:
        pytest.skip("the C++ library is not built")
    question = f'{topics["with"][:600]}\n\nAccording to the text above, what is the "with" statement used for?'
    inputs = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answers, held = {}, {}
    for kernel in ("cpu", "reference"):
        cache = QAQCache.for_model(smollm2.model, fingerprint=smollm2.fingerprint, kernel=kernel)
        answers[kernel] = generated(smollm2.model, inputs, cache, new=13).tolist()
        held[kernel] = cache.nbytes
        assert cache.sequences[0].packed.stop > 100
    assert answers["cpu"] == answers["reference"]
    assert held["cpu"] == pytest.approx(held["reference"], rel=0.01)


def test_balanced_answers_in_english(whole_smollm2: LoadedModel) -> None:
    inputs = whole_smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{TEXT}\nWhat does a comment begin with?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    cache = QAQCache.for_model(whole_smollm2.model, fingerprint=whole_smollm2.fingerprint, target_bits=3)
    text = whole_smollm2.tokenizer.decode(generated(whole_smollm2.model, inputs, cache, new=10)[0])
    assert "hash" in text
    assert cache.stats()[0].compression > 1.5


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_sampling_with_a_seed_is_repeatable(preset: str) -> None:
    model = tiny("llama-gqa")
    known = calibration("llama-gqa")
    inputs = padded([token_ids(80)])

    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        cache = QAQCache.for_model(model, preset=preset, calibration=known)
        return generated(model, inputs, cache, new=24, do_sample=True, temperature=1.0, top_k=0)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts of different lengths as a batch with padding on the left."""
    longest = max(p.shape[1] for p in prompts)
    pad = [torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts]
    ids = torch.cat(pad)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


LENGTHS = (70, 9, 41)


@pytest.mark.parametrize("kind", ["llama-gqa", "opt", "gemma3"])
def test_a_padded_batch_equals_each_alone(kind: str) -> None:
    model = tiny(kind)
    prompts = [token_ids(n, seed=n) for n in LENGTHS]
    cache = QAQCache.for_model(model, preset="fp16")
    batch = generated(model, padded(prompts), cache, new=30)
    for i, prompt in enumerate(prompts):
        alone = QAQCache.for_model(model, preset="fp16")
        assert torch.equal(generated(model, padded([prompt]), alone, new=30)[0], batch[i])
        assert cache.sequences[i].length == prompt.shape[1] + 29
        assert len(cache.sequences[i].packed) == len(alone.sequences[0].packed)


def test_a_padded_batch_of_real_prompts(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    words = TEXT.split()
    texts = [" ".join(words), " ".join(words[:9]), " ".join(words[:30])]
    monkeypatch.setattr(smollm2.tokenizer, "padding_side", "left")
    inputs = smollm2.tokenizer(texts, return_tensors="pt", padding=True)
    cache = QAQCache.for_model(smollm2.model, preset="fp16")
    batch = generated(smollm2.model, inputs, cache, new=5)
    for i, text in enumerate(texts):
        one = smollm2.tokenizer(text, return_tensors="pt")
        assert torch.equal(generated(smollm2.model, one, None, new=5)[0], batch[i])


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_statistics_of_a_batch_are_each_sequences(preset: str) -> None:
    model = tiny("llama-gqa")
    cache = QAQCache.for_model(model, preset=preset, calibration=calibration("llama-gqa"))
    generated(model, padded([token_ids(n, seed=n) for n in LENGTHS]), cache, new=30)
    shape = cache.method.shape
    vectors = shape.layers * shape.kv_heads
    for length, sequence, stats in zip(LENGTHS, cache.sequences, cache.stats(), strict=True):
        assert stats.tokens == length + 29
        assert stats.kv_bytes_fp16 == stats.tokens * vectors * shape.head_dim * 4
        assert stats.kv_bytes == sequence.nbytes
        assert stats.compression == stats.kv_bytes_fp16 / stats.kv_bytes
        assert sum(stats.key_bits.values()) == sum(stats.value_bits.values()) == len(sequence.packed) * vectors
        # Staged: the growing page alone, the complete ones are stored.
        assert stats.staging_bytes == (stats.tokens % 32 > 0) * sequence.staging.shape.nbytes
    assert cache.nbytes == sum(s.kv_bytes for s in cache.stats())


@torch.no_grad()
def test_sequences_of_different_lengths_decode_together() -> None:
    model = tiny("mistral")
    method = make_method(model, preset="fp16")
    prompts = [token_ids(n, seed=n) for n in (60, 23)]
    sequences = [SequenceCache(method) for _ in prompts]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        model(prompt, past_key_values=QAQCache([sequence]))
    tokens = torch.tensor([[5], [7]])
    positions = torch.tensor([[60], [23]])
    together = model(tokens, past_key_values=QAQCache(sequences), position_ids=positions).logits[:, -1]
    for i, prompt in enumerate(prompts):
        alone = model(torch.cat([prompt, tokens[i : i + 1]], 1)).logits[0, -1]
        assert float((together[i] - alone).abs().max()) < 2e-3
    assert [sequence.length for sequence in sequences] == [61, 24]


def test_padding_on_the_right_is_refused() -> None:
    model = tiny("llama-gqa")
    inputs = padded([token_ids(9), token_ids(6)])
    rotated = {name: tensor.flip(1) for name, tensor in inputs.items()}
    with pytest.raises(ConfigError, match="pad on the left"):
        generated(model, rotated, QAQCache.for_model(model, preset="fp16"))


@torch.no_grad()
def test_another_batch_size_is_refused() -> None:
    model = tiny("llama-gqa")
    cache = QAQCache.for_model(model, preset="fp16")
    model(token_ids(4), past_key_values=cache)
    with pytest.raises(ConfigError, match="1 sequences, the batch has 2"):
        model(token_ids(2).view(2, 1), past_key_values=cache)


def test_a_reset_cache_is_empty_and_usable() -> None:
    model = tiny("llama-gqa")
    cache = QAQCache.for_model(model, preset="fp16")
    inputs = padded([token_ids(60)])
    first = generated(model, inputs, cache)
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length(), cache.stats()) == (0, 0, [])
    assert torch.equal(generated(model, inputs, cache), first)


def test_a_model_switched_to_qaq_still_serves_other_caches(smollm2: LoadedModel) -> None:
    inputs = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    smollm2.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = smollm2.model(**inputs).logits
        make_method(smollm2.model, preset="fp16")
        assert smollm2.model.config._attn_implementation == "qaq"
        assert torch.equal(smollm2.model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "best"}, "balanced, paper, fp16"),
        ({"preset": "fp16", "sigma_x": 1.0}, "sigma_x"),
        ({"target_bits": 0}, "target_bits"),
        ({"target_bits": 17}, "target_bits"),
        ({"target_compression": 0.5}, "target_compression"),
        ({"preset": "paper", "codec": "gaussian"}, "codec"),
        ({"preset": "paper", "granularity": "batch"}, "head, layer, token"),
        ({"preset": "paper", "bits": (0, 8)}, "1 <= min"),
        ({"preset": "paper", "bits": (5, 4)}, "1 <= min"),
        ({"preset": "paper", "outlier_ratio": 1.5}, "outlier_ratio"),
        ({"preset": "paper", "outlier_ratio": -0.1}, "outlier_ratio"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    known = {} if settings.get("preset") in ("fp16", "best") else {"calibration": calibration("llama-gqa")}
    with pytest.raises(ConfigError, match=message):
        QAQCache.for_model(tiny("llama-gqa"), **settings, **known)
