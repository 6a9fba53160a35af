"""Keys with large offsets: centering keeps them from costing anything; rotation alone is lost there."""

from __future__ import annotations

from pathlib import Path

import pytest

from qaq_core.calibration import measure
from qaq_core.models import LoadedModel
from qaq_core.models.shape import ModelShape
from qaq_eval.quality import Config, EvalResult, builtin_text, cut_documents, evaluate, summarize
from tests.core.biased import with_key_bias

CONFIGS = ("balanced@3", "hadamard-3")


def test_an_offset_of_the_keys_costs_the_default_nothing(
    shallow_smollm2: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model against its own full precision, with a short calibration of its own."""
    monkeypatch.setenv("QAQ_CACHE_DIR", str(tmp_path))
    documents = cut_documents(
        builtin_text(), shallow_smollm2.tokenizer, context=200, decode=16, documents=1, offset_fraction=0.4
    )
    rows: dict[tuple[bool, str], EvalResult] = {}
    for biased in (False, True):
        model = with_key_bias(shallow_smollm2.model, 30.0) if biased else shallow_smollm2.model
        known = measure(model, ModelShape.of(model), sequences=4, tokens=64)
        known.save(tmp_path / "calibration" / f"{biased}.safetensors")
        parts = list(evaluate(model, str(biased), documents, [Config.parse(name) for name in CONFIGS]))
        rows.update({(biased, name): summarize(parts, name, 200) for name in CONFIGS})
    assert rows[True, "balanced@3"].kl_mean < 2 * rows[False, "balanced@3"].kl_mean
    assert rows[True, "hadamard-3"].kl_mean > 10 * rows[False, "hadamard-3"].kl_mean
    assert rows[True, "balanced@3"].compression > 0.98 * rows[False, "balanced@3"].compression
