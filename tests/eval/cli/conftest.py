"""Models for commands that run in the test's own process, which need not load one each time."""

from __future__ import annotations

from typing import Any

import pytest

from qaq_core import models
from qaq_core.models import LoadedModel


def _given(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands get this model, unless they ask for another form of its weights."""
    load = models.load_model

    def found(source: str, device: str, dtype: str, progress: Any, weights: str = "plain") -> LoadedModel:
        return loaded if weights == "plain" else load(source, device, dtype, progress, weights)

    monkeypatch.setattr(models, "load_model", found)


@pytest.fixture
def loaded_once(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands get the model that is loaded already."""
    _given(smollm2, monkeypatch)


@pytest.fixture
def first_layers(shallow_smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what depends neither on the number of layers nor on what the text says."""
    _given(shallow_smollm2, monkeypatch)
