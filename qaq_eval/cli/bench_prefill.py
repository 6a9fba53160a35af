"""`qaq bench prefill`: the time of a prompt in each cache."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from services.cli.options import Device, Dtype, JsonPath, Model, Weights, model_or_default
from services.cli.terminal import progress_line, screen

CONTEXTS = "1024,2048,4096,8000"


def prefill(
    model: Model = None,
    contexts: Annotated[str, typer.Option(help="Tokens of the prompts, separated by commas.")] = CONTEXTS,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each cache computes each prompt.")] = 3,
    caches: Annotated[str, typer.Option(help="As `qaq bench decode` takes them, separated by commas.")] = "balanced",
    text: Annotated[Path | None, typer.Option(help="Text to read; default: the built-in text.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    weights: Weights = "plain",
    json_path: JsonPath = None,
) -> None:
    """Times prompts in each cache and in transformers' DynamicCache, in turn."""
    from qaq_core import calibration
    from qaq_core.models import load_model
    from qaq_eval.quality import builtin_text
    from qaq_eval.speed.prefill import prefill_speed

    try:
        wanted = [int(part) for part in contexts.split(",")]
    except ValueError as error:
        raise typer.BadParameter("write numbers of tokens, separated by commas", param_hint="--contexts") from error
    names = [name.strip() for name in caches.split(",") if name.strip()]
    with progress_line() as report, calibration.shown(report):
        loaded = load_model(model_or_default(model), device, dtype, partial(_stage, report), weights)
        content = builtin_text() if text is None else text.read_text(encoding="utf-8")
        ids = loaded.tokenizer(content, return_tensors="pt").input_ids.to(device)
        rows = prefill_speed(loaded.model, loaded.fingerprint, ids, wanted, rounds, names, report, loaded.source)
    table = Table("tokens", "cache", "first token", "packed", "CPU", "first token over dense", "packed", "CPU")
    for row in rows:
        table.add_row(
            f"{row.context:,}",
            row.cache,
            f"{row.first_token_milliseconds / 1e3:.2f} s",
            f"{row.milliseconds / 1e3:.2f} s",
            f"{row.cpu_milliseconds / 1e3:.2f} s",
            f"{row.first_token_ratio_to_dynamic_cache:.2f}",
            f"{row.ratio_to_dynamic_cache:.2f}",
            f"{row.cpu_ratio_to_dynamic_cache:.2f}",
        )
    screen.print(table, highlight=False)
    if json_path is not None:
        about = {"model": loaded.name, "dtype": str(loaded.dtype).removeprefix("torch."), "weights": weights}
        result = {**about, "rounds": rounds, **_machine(), "rows": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(result, indent=1) + "\n")


def _stage(report: Any, stage: str, share: float) -> None:
    """Reports a stage without its progress."""
    report(stage, None)


def _machine() -> dict[str, Any]:
    import torch

    from qaq_core.kernels import load_library

    library = load_library()
    return {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "isa": library.qaq_isa().decode() if library else None,
    }
