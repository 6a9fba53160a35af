"""Methods of a worker."""

from __future__ import annotations

import pytest
from qaq.v1 import common_pb2

from qaq_core import ConfigError
from qaq_core.models import LoadedModel
from services.common.settings import WorkerSettings
from services.worker.methods import Methods


@pytest.mark.parametrize("preset", ["h2o-0.2", "uniform-3", "nothing"])
def test_only_presets_are_served(smollm2: LoadedModel, preset: str) -> None:
    methods = Methods(smollm2, WorkerSettings(model="smollm2"))
    with pytest.raises(ConfigError, match=f"preset '{preset}' is not served; use one of balanced, paper, fp16"):
        methods.get(common_pb2.CacheParams(preset=preset))


def test_a_method_is_made_once(smollm2: LoadedModel) -> None:
    methods = Methods(smollm2, WorkerSettings(model="smollm2", preset="fp16"))
    made = methods.get(common_pb2.CacheParams())
    assert made.preset == "fp16"
    assert methods.get(common_pb2.CacheParams(preset="fp16")) is made
