"""`qaq calibrate`: measures a model ahead of its first use, or anew."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from services.cli.stack import Device, Dtype, Model, model_or_default
from services.cli.terminal import progress_line, screen


def register(app: typer.Typer) -> None:
    app.command()(calibrate)


def calibrate(
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write it; default: where this model's is looked for.")
    ] = None,
    gradients: Annotated[
        bool | None, typer.Option(help="Measure sensitivities by gradients or not; default: if memory allows.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Measures what the balanced and paper presets have to know of a model, on text that it samples.

    Written to the cache, or with --output as the table that can be shipped in qaq_core/calibration/tables. A
    table that is shipped for the model comes before the one in the cache.
    """
    from qaq_core import calibration
    from qaq_core.models import ModelShape, load_model

    source = None if gradients is None else calibration.GRADIENTS if gradients else calibration.PERTURBATION
    with progress_line() as report:
        loaded = load_model(model_or_default(model), device, dtype, lambda what, share: report(what, None))
        begun = time.monotonic()
        known = calibration.measure(loaded.model, ModelShape.of(loaded.model), progress=report, source=source)
    path = output or calibration.cached_at(loaded.fingerprint)
    known.save(path)
    screen.print(f"by {known.source} in {time.monotonic() - begun:.0f} s: {path}", soft_wrap=True, highlight=False)
