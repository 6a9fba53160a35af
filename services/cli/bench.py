"""`qaq bench`: how fast it is, against what a user has."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from services.cli.bench_elastic import elastic
from services.cli.bench_prefix import prefix
from services.cli.bench_serve import serve
from services.cli.stack import Device, Dtype, JsonPath, Model, model_or_default
from services.cli.terminal import progress_line, screen, size

if TYPE_CHECKING:
    from qaq_core.evaluation import SpeedRow

CACHES = "balanced,balanced/reference"


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
    bench.command()(decode)
    bench.command()(serve)
    bench.command()(elastic)
    bench.command()(prefix)
    app.add_typer(bench, name="bench")


def decode(
    model: Model = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 1600,
    steps: Annotated[int, typer.Option(min=2, help="Tokens decoded from each cache.")] = 48,
    caches: Annotated[str, typer.Option(help="Presets, by comma; a kernel after /: balanced/reference.")] = CACHES,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_path: JsonPath = None,
) -> None:
    """Decodes from each cache in turn, one step at a time, and from transformers' DynamicCache."""
    import torch

    from qaq_core import calibration
    from qaq_core.errors import ConfigError
    from qaq_core.evaluation import builtin_text, decode_speed
    from qaq_core.loading import load_model

    names = [name.strip() for name in caches.split(",") if name.strip()]
    with progress_line() as report, calibration.shown(report):
        loaded = load_model(model_or_default(model), device, dtype, lambda what, share: report(what, None))
        ids = loaded.tokenizer(builtin_text(), return_tensors="pt").input_ids[:, : context + steps]
        if ids.shape[1] < context + steps:
            raise ConfigError(f"the built-in text has {ids.shape[1]} tokens; ask for a shorter context")
        rows = decode_speed(loaded.model, loaded.fingerprint, ids.to(device), steps, names, report)
    screen.print(_table(rows), highlight=False)
    if json_path is not None:
        about = {"model": loaded.name, "threads": torch.get_num_threads(), "dtype": str(loaded.dtype)}
        json_path.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _table(rows: list[SpeedRow]) -> Table:
    table = Table("cache", "tokens/s", "median step", "of dense", "resident")
    for row in rows:
        table.add_row(
            row.cache,
            f"{row.tokens_per_second:.1f}",
            f"{row.median_ms:.0f} ms",
            f"{row.ratio_to_dynamic_cache:.2f}",
            size(row.kv_bytes),
        )
    return table
