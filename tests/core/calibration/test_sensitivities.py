"""Sensitivities: two ways to measure them that agree, and an estimate of the memory that one of them takes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from qaq_core.allocation.policies.balanced import SINKS
from qaq_core.base.paths import cache_dir
from qaq_core.calibration import Calibration, calibrate, measure, sensitivities, shown
from qaq_core.calibration import measurement as room
from qaq_core.calibration.sensitivities import Seen, gradient_bytes
from qaq_core.models.shape import ModelShape
from tests.core.tiny_models import KINDS, tiny, token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_alone_says_what_the_model_says(kind: str) -> None:
    model, ids = tiny(kind), token_ids(40)
    with torch.no_grad():
        hidden = sensitivities._body(model, model.get_input_embeddings()(ids), Seen())
        got, expected = sensitivities._head(model, hidden), model(input_ids=ids).logits
        assert torch.allclose(got, expected, atol=1e-5)
        assert torch.equal(model(input_ids=ids).logits, expected)  # as it was


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3", "qwen2"])
def test_the_pieces_of_the_loss_add_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(kind), token_ids(48)
    shape = ModelShape.of(model)

    def run() -> torch.Tensor:
        return sensitivities.by_gradients(model, shape, ids, torch.Generator().manual_seed(1))[0]

    whole = run()
    monkeypatch.setattr(sensitivities, "LOGITS", 97 * 7)  # seven positions at a time
    assert torch.allclose(run(), whole, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3", "qwen2"])
def test_disturbing_measures_the_trace_that_gradients_do(kind: str) -> None:
    model, generator = tiny(kind), torch.Generator().manual_seed(0)
    shape = ModelShape.of(model)
    texts = [token_ids(64, seed=seed) for seed in range(4)]
    with room._prepared(model):
        exact = sum(sensitivities.by_gradients(model, shape, ids, generator) for ids in texts)
        near = sum(torch.stack(list(sensitivities.by_perturbation(model, shape, ids, generator)), 1) for ids in texts)
    assert isinstance(exact, torch.Tensor)
    ratio = (near / exact.diagonal(dim1=-2, dim2=-1).mean(-1)).log2()
    assert ratio.shape == (2, shape.layers, shape.kv_heads)
    assert float(ratio.abs().median()) < 0.8


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3"])
def test_tokens_that_stay_exact_do_not_count(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(kind), token_ids(48)
    shape = ModelShape.of(model)

    def run(sinks: int) -> torch.Tensor:
        monkeypatch.setattr(sensitivities, "SINKS", sinks)
        return sensitivities.by_gradients(model, shape, ids, torch.Generator().manual_seed(1))

    assert sensitivities.SINKS == SINKS
    of_sinks = run(0) - run(SINKS)
    assert bool((of_sinks.diagonal(dim1=-2, dim2=-1).sum(-1) > 0).all())
    assert int(torch.linalg.matrix_rank(of_sinks, rtol=1e-6).max()) == SINKS


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_covers_what_a_longer_text_saves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivities, "LOGITS", 0)
    model = tiny(kind)
    saved = sensitivities._saved_bytes(model, 256)
    assert saved <= gradient_bytes(model, 256) <= 8 * saved


def _poor(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("QAQ_CACHE_DIR", str(directory))
    monkeypatch.setattr(measure, "__defaults__", (1, 24, None, 0, None))


def test_without_memory_for_gradients_the_other_way_is_taken_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _poor(monkeypatch, tmp_path)
    monkeypatch.setattr(sensitivities, "free_bytes", lambda device: 1000)
    model = tiny("llama-gqa")
    with caplog.at_level(logging.WARNING):
        known = calibrate(model, ModelShape.of(model))
    assert known.source == "perturbation"
    assert "0.0 GB are free: measuring sensitivities by perturbation" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert calibrate(model, ModelShape.of(model)).source == "perturbation"  # from the file
    assert "for want of memory for gradients" in caplog.text


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_takes_the_other_way(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(sensitivities, "by_gradients", fail)
    model = tiny("llama-gqa")
    assert measure(model, ModelShape.of(model), sequences=1, tokens=16).source == "perturbation"


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(sensitivities, "by_gradients", fail)
    model = tiny("llama-gqa")
    with pytest.raises(RuntimeError, match="something else"):
        measure(model, ModelShape.of(model), sequences=1, tokens=16)


def test_progress_is_shown_to_whoever_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _poor(monkeypatch, tmp_path)
    model, told = tiny("llama-gqa"), []
    with shown(lambda what, share: told.append((what, share))):
        calibrate(model, ModelShape.of(model))
    assert told[0] == ("sampling text to calibrate on", 0.0)
    assert told[-1] == ("calibrating", 1.0)
    told.clear()
    measure(model, ModelShape.of(model), sequences=1, tokens=16)
    assert told == []


def test_what_cannot_be_kept_is_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _poor(monkeypatch, tmp_path / "file" / "cache")
    (tmp_path / "file").write_text("in the way")
    model = tiny("llama-gqa")
    with caplog.at_level(logging.WARNING):
        assert isinstance(calibrate(model, ModelShape.of(model)), Calibration)
    assert "calibrating without keeping it" in caplog.text
    assert cache_dir() == tmp_path / "file" / "cache"
