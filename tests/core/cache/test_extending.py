"""The documentation's own policy and codec, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qaq_core.cache import presets
from qaq_core.cache.cache import QAQCache
from qaq_eval.quality import Config, Document, evaluate, summarize
from tests.core.tiny_models import tiny, token_ids

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's code defines."""
    monkeypatch.setattr(presets, "PRESETS", dict(presets.PRESETS))
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    return names


def test_the_policy_serves_a_model_and_narrows_what_ages(written: dict[str, Any]) -> None:
    model, ids = tiny("llama-gqa"), token_ids(220)
    cache = QAQCache.for_model(model, preset="recency")
    with torch.no_grad():
        for i in range(180, 220):
            model(ids[:, i : i + 1] if i > 180 else ids[:, :181], past_key_values=cache)
    after = cache.stats()[0]
    assert after.rows_narrowed > 0
    assert after.rows_requantized == 0
    widths = cache.sequences[0].packed.widths(0)[0, 0].float()
    old, middle, young = (part.mean() for part in widths.chunk(3))
    assert old < middle < young


def test_the_policy_meets_a_target(written: dict[str, Any]) -> None:
    model = tiny("llama-gqa")
    cache = QAQCache.for_model(model, preset="recency", target_bits=4.0)
    with torch.no_grad():
        model(token_ids(180), past_key_values=cache)
    held = cache.stats()[0].key_bits
    assert sum(bits * count for bits, count in held.items()) / sum(held.values()) == pytest.approx(4.0, abs=0.2)


def test_it_is_a_configuration_to_measure(written: dict[str, Any]) -> None:
    document = Document(0, token_ids(181)[0], 160)
    names = ["recency@6", "recency@2"]
    parts = list(evaluate(tiny("llama-gqa"), "tiny", [document], [Config.parse(name) for name in names]))
    good, bad = (summarize(parts, name, 160) for name in names)
    assert good.kl_mean < bad.kl_mean
    assert good.bits_key > bad.bits_key + 3


def test_the_codec_codes(written: dict[str, Any]) -> None:
    rows = torch.randn(1, 2, 5, 64, generator=torch.Generator().manual_seed(0))
    codec = written["ClippedCodec"]("head")
    scale, offset = codec.affine(codec.meta(rows, None))
    units = (rows - offset.unsqueeze(-1)) / scale
    levels = codec.levels(8)[codec.codes(units).long()]
    inside = (units > 0) & (units < 1)
    assert bool(inside.float().mean() > 0.98)
    assert float(((levels - units) * inside).abs().max()) < 1 / 256
