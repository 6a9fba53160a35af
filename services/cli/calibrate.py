"""`qaq calibrate`: calibrates a model before its first use, or again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from services.cli.options import Device, Dtype, Model, model_or_default
from services.cli.terminal import progress_line, screen


def register(app: typer.Typer) -> None:
    app.command()(calibrate)


def calibrate(
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write; default: the model's entry in the cache directory.")
    ] = None,
    gradients: Annotated[
        bool | None, typer.Option(help="Whether to measure sensitivities by gradients; default: if memory allows.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Measures what the balanced and paper presets need to know of a model, on text that the model samples.

    The table is written to the cache directory, or to --output, which may be in qaq_core/calibration/tables. A table
    shipped there takes precedence over the cache directory.
    """
    from qaq_core import calibration
    from qaq_core.models import ModelShape, load_model

    source = None if gradients is None else calibration.GRADIENTS if gradients else calibration.PERTURBATION
    with progress_line() as report:
        loaded = load_model(model_or_default(model), device, dtype, lambda what, share: report(what, None))
        begun = time.monotonic()
        table = calibration.measure(loaded.model, ModelShape.of(loaded.model), progress=report, source=source)
    path = output or calibration.cached_at(loaded.fingerprint)
    table.save(path)
    screen.print(f"by {table.source} in {time.monotonic() - begun:.0f} s: {path}", soft_wrap=True, highlight=False)
