"""The examples that use the library alone, with the demo model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qaq_core import models
from qaq_core.cache import presets
from qaq_core.models import LoadedModel

from .conftest import Run

pytestmark = pytest.mark.model


@pytest.fixture
def loaded_once(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples get the model that is loaded already."""
    monkeypatch.setattr(models, "load_model", lambda source: smollm2)


@pytest.mark.usefixtures("loaded_once")
def test_drop_in(run: Run) -> None:
    said = run("drop_in", "The capital of France is", "--max-new-tokens", 24)
    assert "Paris" in said
    assert re.search(r"\d+ tokens in [\d,]+ bytes: 1\.\d times smaller", said)


@pytest.mark.usefixtures("loaded_once")
def test_multi_turn(run: Run) -> None:
    said = run("multi_turn", "Name the capital of France.", "And of Italy?", "--max-new-tokens", 12)
    assert "Paris" in said
    assert "Rome" in said
    first, second = re.findall(r"\[(\d+) tokens were in the cache, (\d+) were computed", said)
    assert first[0] == "0"
    assert int(second[0]) > int(second[1])


@pytest.mark.usefixtures("loaded_once")
def test_own_policy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "PRESETS", dict(presets.PRESETS))
    said = run("own_policy", "--target-bits", 3)
    lost = dict(re.findall(r"^(\S+): [\d.]+ times smaller, KL ([\d.]+)", said, re.MULTILINE))
    assert 0 < float(lost["balanced"]) < float(lost["early-layers"])


@pytest.mark.usefixtures("loaded_once")
def test_long_document(run: Run, tmp_path: Path) -> None:
    document = tmp_path / "report.txt"
    document.write_text("The harbour was built in 1871 by Anna Berg. " + "The sea was calm on most days. " * 45)
    asked = ("--question", "Who built the harbour?", "--compression", 3, "--max-new-tokens", 16)
    said = run("long_document", "--file", document, *asked)
    assert "Anna Berg" in said
    times = re.search(r"([\d.]+) times smaller", said)
    assert times is not None
    assert float(times[1]) == pytest.approx(3, rel=0.1)
