"""Other architectures: what attends in half precision says what transformers' own cache says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qaq_core.base.errors import UnsupportedModelError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF
from qaq_core.cache.cache import QAQCache
from tests.core.tiny_models import KINDS, SLIDING, calibration, capped, teacher_forced, tiny, token_ids

PROMPT, TOTAL = 90, 130


@pytest.mark.parametrize("kind", KINDS)
def test_exact_equals_the_dynamic_cache(kind: str) -> None:
    model, ids = tiny(kind), token_ids(TOTAL)
    expected = teacher_forced(model, ids, PROMPT)
    cache = QAQCache.for_model(model, preset="fp16")
    got = teacher_forced(model, ids, PROMPT, cache)
    assert len(cache.sequences[0].packed) >= 64
    # Rounding every key and value to half precision alone makes up to 1.8e-3 here.
    assert float((got - expected).abs().max()) < 2e-3


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, {"preset": "balanced", "target_bits": 3.0}) for kind in KINDS]
    + [(kind, {"preset": "paper"}) for kind in ("llama-mqa-80", "gemma3", "opt")],
)
def test_quantized_runs_and_is_near(kind: str, settings: dict[str, Any]) -> None:
    model, ids = tiny(kind), token_ids(TOTAL)
    expected = teacher_forced(model, ids, PROMPT)
    cache = QAQCache.for_model(model, calibration=calibration(kind), **settings)
    got = teacher_forced(model, ids, PROMPT, cache)
    stats = cache.stats()[0]
    vectors = len(cache.sequences[0].packed) * cache.method.shape.layers * cache.method.shape.kv_heads
    assert sum(stats.key_bits.values()) == sum(stats.value_bits.values()) == vectors
    assert set(stats.key_bits) != {16}
    near = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
    assert float(near.median()) > 0.8


@pytest.mark.parametrize("kind", SLIDING)
def test_what_has_slid_out_of_the_window_does_not_count(kind: str) -> None:
    """Packed rows of a sliding layer that no later query sees can hold anything; those of a full layer cannot."""
    model, ids = tiny(kind), token_ids(TOTAL)

    def run(spoiled: str) -> torch.Tensor:
        cache = QAQCache.for_model(model, preset="fp16")
        with torch.no_grad():
            model(ids[:, :PROMPT], past_key_values=cache)
        sequence = cache.sequences[0]
        types = model.config.layer_types if kind == "gemma3" else ["sliding_attention"] * 3
        layers = [i for i, t in enumerate(types) if t == spoiled]
        gone = PROMPT - 24 - sequence.packed.start  # packed tokens no query from here on can see
        assert gone > 20
        for side in (KEY, VALUE):
            pool = sequence.packed.sides[side].pools[0]
            for layer in layers:
                rows = pool.layer(HALF, layer).view(sequence.packed.heads, len(sequence.packed), -1)
                rows[:, :gone] = 0x3C  # finite half-precision numbers about 1
        with torch.no_grad():
            return torch.stack(
                [model(ids[:, i : i + 1], past_key_values=cache).logits[0, -1] for i in range(PROMPT, TOTAL)]
            )

    clean = run("none")
    assert torch.equal(run("sliding_attention"), clean)
    if kind == "gemma3":
        assert not torch.allclose(run("full_attention"), clean, atol=0.1)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3", "mistral-sliding"])
def test_generate_says_the_same_from_either_cache(kind: str) -> None:
    """Greedy text from packed half precision, past the sliding window, against transformers' own cache."""
    model, ids = tiny(kind), token_ids(70, seed=3)
    cache = QAQCache.for_model(model, preset="fp16")
    got = model.generate(ids, past_key_values=cache, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert len(cache.sequences[0].packed) >= 64
    logits = teacher_forced(model, got[:, :-1], 70)
    logits[:, model.config.eos_token_id] = float("-inf")
    chosen = logits.gather(1, got[0, 70:, None])[:, 0]
    assert len(chosen) == 40
    # Rounding to half precision may decide between two that are as good.
    assert float((logits.amax(1) - chosen).max()) < 4e-3


def test_capped_logits_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="caps its attention logits"):
        QAQCache.for_model(capped(), preset="fp16")
