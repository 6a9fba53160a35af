"""Calibration: what is measured is what its formulas say, and it is measured once."""

from __future__ import annotations

import copy
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import DynamicCache

from qaq_core import QAQCache
from qaq_core.allocation.policies.balanced import SINKS
from qaq_core.base.errors import ConfigError, UnsupportedModelError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.calibration import cached_at, calibrate, known, measure
from qaq_core.calibration import measurement as room
from qaq_core.models import LoadedModel, load_model
from qaq_core.models.fingerprint import leave_fingerprint, left_fingerprint, weights_fingerprint
from qaq_core.models.shape import ModelShape
from qaq_core.quantization.transforms import LinearTransform
from tests.core.tiny_models import KINDS, calibration, tiny, token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_quick_measurement_gives_finite_tables(kind: str) -> None:
    known, shape = calibration(kind), ModelShape.of(tiny(kind))
    for side in (known.key_mean, known.value_mean):
        assert side.shape == (shape.layers, shape.kv_heads, shape.head_dim)
        assert bool(torch.isfinite(side).all())
    heads = (shape.layers, shape.kv_heads)
    octets = (*heads, shape.head_dim // 8)
    for table, dims in ((known.key_costs, octets), (known.value_costs, octets), (known.query_norm, heads)):
        assert table.shape == dims
        assert bool(torch.isfinite(table).all())
        assert bool((table > 0).all())
    for matrix in (known.key_matrix, known.value_matrix):
        assert (matrix.shape, matrix.dtype) == ((*heads, shape.head_dim, shape.head_dim), torch.float16)
        assert bool(torch.isfinite(torch.linalg.inv(matrix.double())).all())


@pytest.mark.parametrize("kind", ["qwen2", "llama-gqa", "mistral"])
def test_means_are_those_of_the_projections_before_rope(kind: str) -> None:
    model = tiny(kind)
    shape = ModelShape.of(model)
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}

    def watch(layer: int, name: str, out: torch.Tensor) -> None:
        if out.shape[1] == 1:  # a sampled token, not what comes after
            seen.setdefault((layer, name), []).append(out.detach()[0, 0].view(shape.kv_heads, shape.head_dim))

    for layer, block in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):
            module = getattr(block.self_attn, name)
            module.register_forward_hook(lambda m, a, out, layer=layer, name=name: watch(layer, name, out))
    known = measure(model, shape, sequences=1, tokens=16)
    for layer in range(shape.layers):
        for name, table in (("k_proj", known.key_mean), ("v_proj", known.value_mean)):
            assert torch.allclose(table[layer], torch.stack(seen[layer, name])[SINKS:].mean(0), atol=1e-4)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny("llama-gqa")
    before = weights_fingerprint(model)
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    was = [p.requires_grad for p in model.parameters()]
    implementation = model.config._attn_implementation
    measure(model, ModelShape.of(model), sequences=1, tokens=8)
    assert [p.requires_grad for p in model.parameters()] == was
    assert all(p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == implementation
    assert weights_fingerprint(model) == before


@pytest.mark.parametrize("off", [torch.inference_mode, torch.no_grad])
def test_it_is_measured_where_gradients_are_off(off: Any) -> None:
    model, shape = tiny("llama-gqa"), ModelShape.of(tiny("llama-gqa"))
    want = measure(model, shape, sequences=1, tokens=16, source=room.GRADIENTS)
    with off():
        got = measure(model, shape, sequences=1, tokens=16, source=room.GRADIENTS)
    assert torch.equal(got.key_costs, want.key_costs)
    assert not got.key_costs.is_inference()


def test_the_same_seed_measures_the_same() -> None:
    model = tiny("llama-gqa")
    again = measure(model, ModelShape.of(model), sequences=2, tokens=32)
    known = calibration("llama-gqa")
    for name, table in again.tables.items():
        other = known.tables[name]
        if name.endswith("matrix"):  # axes have no sign of their own, and sums are rounded as threads come
            table, other = (matrix.double().mT @ matrix.double() for matrix in (table, other))
        torch.testing.assert_close(table, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))


def test_it_is_measured_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(room, "SEQUENCES", 1)
    model = tiny("llama-gqa")
    shape = ModelShape.of(model)
    monkeypatch.setattr(measure, "__defaults__", (1, 8, None, 0, None))
    first = calibrate(model, shape)
    stored = list(tmp_path.rglob("*.safetensors"))
    assert [path.stem for path in stored] == [weights_fingerprint(model)]
    monkeypatch.setattr(room, "measure", None)
    second = calibrate(model, shape)
    assert all(torch.equal(table, second.tables[name]) for name, table in first.tables.items())


def test_the_demo_models_calibration_is_shipped(
    smollm2: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(room, "measure", None)
    known = calibrate(smollm2.model, ModelShape.of(smollm2.model), smollm2.fingerprint)
    assert known.key_mean.shape == (30, 3, 64)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Calibrations are of one short text, and kept in an empty directory."""
    monkeypatch.setenv("QAQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measure, "__defaults__", (1, 8, None, 0, None))
    return tmp_path


def test_the_readmes_line_finds_the_shipped_table(
    smollm2: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what `load_model` left on the model; nothing is hashed."""
    monkeypatch.setenv("QAQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(room, "measure", None)
    monkeypatch.setattr(room, "weights_fingerprint", None)
    cache = QAQCache.for_model(smollm2.model)
    assert cache.method.shape.layers == 30
    assert not list(tmp_path.iterdir())


def test_a_model_that_transformers_loaded_finds_the_shipped_table(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its weights: they are those of `from_pretrained(…, gguf_file=…)`, which made the copy that is read here."""
    model = load_model(str(model_path)).model
    del model._qaq_fingerprint
    monkeypatch.setenv("QAQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(room, "measure", None)
    assert QAQCache.for_model(model).method.shape.layers == 30
    assert not list(tmp_path.iterdir())
    assert left_fingerprint(model) is not None  # hashed once


def test_weights_that_changed_are_another_model() -> None:
    model = tiny("llama-gqa")
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    first = weights_fingerprint(model)
    assert left_fingerprint(model) is None
    leave_fingerprint(model, "abc")
    assert left_fingerprint(model) == "abc"
    model.set_attn_implementation("eager")
    assert left_fingerprint(model) == "abc"
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert left_fingerprint(model) is None
    assert weights_fingerprint(model) != first


def test_what_attention_does_with_the_weights_is_in_the_fingerprint() -> None:
    model, other = tiny("llama-gqa"), tiny("llama-gqa")
    other.config._name_or_path = "elsewhere"
    assert weights_fingerprint(model) == weights_fingerprint(other)
    other.model.rotary_emb.inv_freq *= 2
    assert weights_fingerprint(model) != weights_fingerprint(other)


@pytest.mark.usefixtures("quick")
def test_minutes_of_silence_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama-gqa")
    with caplog.at_level(logging.WARNING):
        QAQCache.for_model(model)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    kept = cached_at(weights_fingerprint(model))
    for part in ("calibrating LlamaForCausalLM once", "takes about", str(kept), "preset='fp16'", "docs/calibration.md"):
        assert part in said[0]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        QAQCache.for_model(tiny("llama-gqa"))
    assert not caplog.records


@pytest.mark.usefixtures("quick")
def test_progress_is_shown_in_place_of_the_announcement(caplog: pytest.LogCaptureFixture) -> None:
    stages: list[tuple[str, float]] = []
    with caplog.at_level(logging.WARNING):
        QAQCache.for_model(tiny("qwen2"), progress=lambda stage, share: stages.append((stage, share)))
    assert [record for record in caplog.records if "calibrating" in record.getMessage()] == []
    assert {stage for stage, _ in stages} == {"sampling text to calibrate on", "calibrating"}
    assert stages[-1][1] == 1.0


@pytest.mark.usefixtures("quick")
def test_a_wait_for_another_process_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama-gqa")
    path = cached_at(weights_fingerprint(model))
    path.parent.mkdir(parents=True)
    lock = FileLock(path.with_suffix(".lock"))
    lock.acquire()
    waiting = threading.Thread(target=calibrate, args=(model, ModelShape.of(model)))
    with caplog.at_level(logging.WARNING):
        waiting.start()
        while not caplog.records:
            waiting.join(0.01)
        calibration("llama-gqa").save(path)
        lock.release()
        waiting.join()
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for another process, which calibrates LlamaForCausalLM"
    ]


@pytest.mark.usefixtures("quick")
def test_the_fingerprint_of_another_model_is_refused() -> None:
    calibration("llama-mqa-80").save(cached_at("anothermodel"))
    assert known("anothermodel") is not None
    with pytest.raises(ConfigError, match="this model's own fingerprint"):
        QAQCache.for_model(tiny("llama-gqa"), fingerprint="anothermodel")


def test_a_copy_of_a_model_finds_the_same_table(quick: Path) -> None:
    model = tiny("llama-gqa")
    QAQCache.for_model(model)
    QAQCache.for_model(copy.deepcopy(model))
    assert len(list(quick.rglob("*.safetensors"))) == 1


def test_fingerprints_tell_weights_apart() -> None:
    model = tiny("llama-gqa")
    first = weights_fingerprint(model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert weights_fingerprint(model) != first


def test_a_model_without_a_first_token_is_refused() -> None:
    model = tiny("llama-gqa")
    model.config.bos_token_id = model.config.eos_token_id = None
    with pytest.raises(UnsupportedModelError, match="neither a BOS nor an EOS"):
        measure(model, ModelShape.of(model), sequences=1, tokens=4)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_rows_of_the_models_own_text_are_typical(kind: str) -> None:
    """In its frame an octet of what the model says has a variance near 1: keys with their means before RoPE."""
    model, ids = tiny(kind), token_ids(300)
    shape, known = ModelShape.of(model), measure(tiny(kind), ModelShape.of(tiny(kind)), sequences=2, tokens=256)
    transform = LinearTransform(
        known.key_matrix,
        known.value_matrix,
        known.key_mean,
        known.value_mean,
        shape.frequencies,
        torch.tensor(shape.kind),
    )
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for side in (KEY, VALUE):
        held = [(layer.keys, layer.values)[side][0] for layer in cache.layers]
        rows = transform.rows(side, torch.stack(held), 0)
        variance = rows.square().unflatten(-1, (-1, 8)).mean((2, 4))
        assert 0.3 < float(variance.mean()) < 3
