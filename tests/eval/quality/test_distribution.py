"""Distributions of keys and values: figures that are known, and a model's."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from qaq_core.cache.cache import QAQCache
from qaq_eval.quality import Document, distribution
from qaq_eval.quality.distribution import _distribution
from tests.core.tiny_models import tiny, token_ids


def test_a_normal_is_told_from_one_with_a_channel_of_outliers() -> None:
    vectors = torch.randn(2, 4000, 32, generator=torch.Generator().manual_seed(0))
    plain = _distribution(3, "key", vectors)
    assert (plain.layer, plain.side) == (3, "key")
    assert plain.mean == pytest.approx(0, abs=0.01)
    assert plain.deviation == pytest.approx(1, rel=0.01)
    assert plain.quantiles["0.99"] == pytest.approx(2.326, rel=0.03)
    assert plain.quantiles["0.001"] == pytest.approx(-3.09, rel=0.05)
    assert plain.beyond["3"] == pytest.approx(0.0027, rel=0.1)
    assert plain.in_few_channels < 0.2
    assert plain.quantiles["0.0"] == float(vectors.min())
    vectors[1, :, 7] += 12
    spoiled = _distribution(3, "key", vectors)
    assert spoiled.beyond["3"] == pytest.approx(1 / 64, rel=0.1)
    assert spoiled.in_few_channels > 0.95
    assert spoiled.quantiles["1.0"] > 10


def test_of_a_model() -> None:
    model, documents = tiny("gemma3"), [Document(i, token_ids(42, seed=i)[0], 40) for i in range(2)]
    spreads = distribution(model, "tiny", documents)
    assert [(s.layer, s.side) for s in spreads] == [(layer, s) for layer in range(3) for s in ("key", "value")]
    cache = QAQCache.for_model(model, preset="fp16")
    with torch.no_grad():
        model(documents[0].ids[None, :40], past_key_values=cache)
        model(documents[0].ids[None, 40:41], past_key_values=cache)
    both = [spread for spread in distribution(model, "tiny", documents[:1]) if spread.layer == 1]
    keys = model.model.layers[1].self_attn.k_norm(torch.ones(1, 256))
    assert both[0].deviation == pytest.approx(float(keys.detach().square().mean().sqrt()), rel=0.5)  # normalized keys
    assert all(0 <= share <= 1 for spread in spreads for share in asdict(spread)["beyond"].values())
