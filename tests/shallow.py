"""The demo model's first layers, a fifth of all: its vocabulary and its weights in less time a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from qaq_core import calibration
from qaq_core.calibration import Calibration
from qaq_core.calibration import measurement as room
from qaq_core.models import LoadedModel
from services.worker.methods import twin

LAYERS = 6
TOKEN_BYTES = LAYERS * 2 * 3 * 64 * 2
"""Of a token's keys and values in half precision."""


@contextmanager
def shallow(whole: LoadedModel) -> Iterator[LoadedModel]:
    """A model that shares the weights of `whole`. Its calibration is found while the context lasts."""
    model = twin(whole.model)
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:LAYERS]
    made = replace(whole, model=model, fingerprint=f"{LAYERS:02d}{whole.fingerprint[2:]}")
    measured = calibration.known(whole.fingerprint)
    assert measured is not None
    tables = {name: table[:LAYERS].clone() for name, table in measured.tables.items()}
    known = room.known

    def found(fingerprint: str) -> Calibration | None:
        return Calibration(**tables) if fingerprint == made.fingerprint else known(fingerprint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "known", found)
        yield made
