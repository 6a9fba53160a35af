"""`qaq bench elastic` and `qaq bench prefix`, small: what they measure depends on no text, so a few layers do."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from qaq_core import models
from qaq_core.models import LoadedModel

from .command import ROOT, here


@pytest.fixture(autouse=True)
def _first_layers(shallow_smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands get the demo model's first layers."""
    monkeypatch.setattr(models, "load_model", lambda *_: shallow_smollm2)


def bench(name: str, path: Path, *options: str) -> dict:
    result = here("bench", name, "--json", path, *options)
    assert result.returncode == 0, result.stderr
    figures = json.loads(path.read_text())
    jsonschema.validate(figures, json.loads((ROOT / "qaq_eval" / "schemas" / f"bench_{name}.json").read_text()))
    return figures


def test_elastic(tmp_path: Path) -> None:
    figures = bench("elastic", tmp_path / "elastic.json", "--context", "256", "--sessions", "9", "--seconds", "1")
    assert figures["kv_bytes"] <= figures["budget_bytes"]
    assert figures["shrink_seconds"] is not None
    assert figures["streams_stopped"] == 0
    assert figures["bits_squeezed"] < figures["bits"]
    assert figures["recover_seconds"] is not None


def test_prefix(tmp_path: Path) -> None:
    figures = bench("prefix", tmp_path / "prefix.json", "--context", "512", "--repeats", "1")
    assert figures["loaded_tokens"] == 384  # all but the last 128, in whole pages
