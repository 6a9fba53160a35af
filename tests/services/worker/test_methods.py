"""Methods of a worker."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qaq.v1 import common_pb2

from qaq_core import ConfigError
from qaq_core.calibration import calibrate
from qaq_core.models import LoadedModel, ModelShape
from services.common.errors import Unavailable
from services.common.settings import WorkerSettings
from services.worker import methods as of_worker
from services.worker.methods import Methods, twin

from ...core.tiny_models import KINDS

FP16, BALANCED = (common_pb2.CacheParams(preset=name) for name in ("fp16", "balanced"))


@pytest.mark.parametrize("preset", ["h2o-0.2", "uniform-3", "nothing"])
async def test_only_presets_are_served(smollm2: LoadedModel, preset: str) -> None:
    methods = Methods(smollm2, WorkerSettings(model="smollm2"))
    params = common_pb2.CacheParams(preset=preset)
    message = f"preset '{preset}' is not served; use one of balanced, paper, fp16"
    with pytest.raises(ConfigError, match=message):
        methods.get(params)
    with pytest.raises(ConfigError, match=message):
        await methods.ready(params)


async def test_a_method_is_made_once(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_worker, "_KEPT_METHODS", 3)
    methods = Methods(smollm2, WorkerSettings(model="smollm2", preset="fp16"))
    made = methods.get(common_pb2.CacheParams())
    assert made.preset == "fp16"
    await methods.ready(FP16)
    assert methods.get(FP16) is made
    for bits in range(2, 6):
        params = common_pb2.CacheParams(preset="balanced", target_bits=bits)
        await methods.ready(params)
        assert methods.get(params) is methods.get(params)
    assert len(methods._made) == 3


class Slow:
    """Stands between a measurement and its progress: it goes on when it may."""

    def __init__(self) -> None:
        self.begun, self.may_go_on = asyncio.Event(), False
        self._loop = asyncio.get_running_loop()

    def watch(self, methods: Methods, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = methods._progress

        def progress() -> Any:
            report = plain()

            def slowly(stage: str, done: float) -> None:
                self._loop.call_soon_threadsafe(self.begun.set)
                while not self.may_go_on and not methods._stopped:
                    time.sleep(0.01)
                report(stage, done)

            return slowly

        monkeypatch.setattr(methods, "_progress", progress)


@pytest.fixture
def unmeasured(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LoadedModel:
    monkeypatch.setenv("QAQ_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = KINDS["llama-gqa"]().eval()
    model.config.max_position_embeddings = 32  # as many tokens are measured
    return replace(smollm2, model=model, fingerprint="unmeasured")


async def test_others_compute_while_a_preset_is_measured(
    unmeasured: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = Methods(unmeasured, WorkerSettings(model="tiny", preset="fp16"))
    methods.get(FP16)
    model = unmeasured.model
    ids = torch.arange(1, 9)[None]
    with torch.inference_mode():
        before = model(ids).logits
    slow = Slow()
    slow.watch(methods, monkeypatch)
    waits = asyncio.create_task(methods.ready(BALANCED))
    gives_up = asyncio.create_task(methods.ready(BALANCED))
    await slow.begun.wait()
    gives_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gives_up
    await methods.ready(FP16)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "qaq"
    slow.may_go_on = True
    await waits
    made = methods.get(BALANCED)
    assert made.preset == "balanced"
    assert methods.get(BALANCED) is made
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)


async def test_a_worker_that_stops_ends_a_measurement(unmeasured: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = Methods(unmeasured, WorkerSettings(model="tiny", preset="fp16"))
    slow = Slow()
    slow.watch(methods, monkeypatch)
    waits = asyncio.create_task(methods.ready(BALANCED))
    await slow.begun.wait()
    methods.close()
    with pytest.raises(Unavailable, match="stopped"):
        await waits
    with pytest.raises(Unavailable, match="stopped"):
        await methods.ready(BALANCED)


def test_a_twin_shares_weights_and_is_measured_alike(unmeasured: LoadedModel, tmp_path: Path) -> None:
    model = unmeasured.model
    other = twin(model)
    assert [a is b for a, b in zip(model.parameters(), other.parameters(), strict=True)] == [True] * len(
        list(model.parameters())
    )
    other.set_attn_implementation("sdpa")
    model.set_attn_implementation("eager")
    assert other.config._attn_implementation == "sdpa"
    assert other.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    shape = ModelShape.of(model)
    measured = [calibrate(each, shape, name).tables for each, name in ((model, "first"), (other, "second"))]
    for name, table in measured[0].items():
        assert torch.equal(table, measured[1][name]), name


def test_a_twin_of_packed_and_compiled_layers(smollm2: LoadedModel) -> None:
    ids = torch.arange(1, 9)[None]
    layer = smollm2.model.model.layers[0]
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    try:
        other = twin(smollm2.model)
        assert "forward" not in vars(other.model.layers[0])
        with torch.inference_mode():
            assert torch.equal(other(ids).logits, smollm2.model(ids).logits)
    finally:
        del layer.forward
    for first, second in zip(smollm2.model.modules(), other.modules(), strict=True):
        for name, value in vars(first).items():
            assert not isinstance(value, torch.Tensor) or vars(second)[name] is value
