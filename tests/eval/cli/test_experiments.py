"""The table of experiments: every configuration is one, and can be made."""

from __future__ import annotations

import json

import pytest

from qaq_eval.cli.experiments import EXPERIMENTS
from qaq_eval.quality import Config
from tests.core.tiny_models import calibration, tiny
from tests.e2e.command import ROOT


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_configurations_can_be_made(name: str) -> None:
    model, configs = tiny("llama-gqa"), EXPERIMENTS[name].configs
    assert len(set(configs)) == len(configs)
    for text in configs:
        config = Config.parse(text)
        assert config.text == text
        known = {"calibration": calibration("llama-gqa")} if config.preset in ("balanced", "paper") else {}
        method = Config(text, config.preset, {**config.settings, **known}).method(model, "tiny")
        assert method.target.compression == config.settings.get("target_compression")


def test_the_schema_names_them_all() -> None:
    schema = json.loads((ROOT / "qaq_eval" / "schemas" / "paper.json").read_text())
    assert schema["properties"]["experiment"]["enum"] == list(EXPERIMENTS)
