"""`qaq models`: which models are served, and adding and removing those of a stack."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from services.cli import options
from services.cli.client import DEADLINE_S, Router
from services.cli.running import Address, where
from services.cli.terminal import screen, starting

PATIENCE_S = 600.0

Name = Annotated[str, typer.Argument(metavar="MODEL", help="Its name, as `qaq models` shows it.")]


def register(app: typer.Typer) -> None:
    models = typer.Typer(
        help="Shows the models that are served; adds models to a stack and removes them.", invoke_without_command=True
    )
    models.callback()(shown)
    models.command()(add)
    models.command()(remove)
    app.add_typer(models, name="models", rich_help_panel="Stack")


def shown(context: typer.Context, router: Router = None, tenant: options.Tenant = None) -> None:
    """Shows the models that are served; adds models to a stack and removes them."""
    if context.invoked_subcommand is not None:
        return
    from qaq.v1 import generate_pb2

    from services.cli.inference import inference

    with inference(router, metadata=options.metadata(tenant)) as asked:
        found = asked.once(lambda stub: stub.ListModels(generate_pb2.ListModelsRequest(), timeout=DEADLINE_S))
    table = Table()
    for column in ("model", "workers", "in the queue", "context", "from"):
        table.add_column(column, overflow="fold")
    for each in found.models:
        model = each.model
        name = f"{model.name} (default)" if each.is_default else model.name
        table.add_row(name, str(each.workers), str(each.waiting), f"{model.context_length:,}", model.source)
    screen.print(table, markup=False)
    for each in found.models:
        if each.unavailable:
            screen.print(each.unavailable, markup=False, highlight=False, soft_wrap=True)


def add(
    model: Annotated[str, typer.Argument(help="Local directory, GGUF file or hub id.")],
    workers: options.Workers = 1,
    device: Annotated[str | None, options.DEVICE] = None,
    dtype: Annotated[str | None, options.DTYPE] = None,
    weights: Annotated[str | None, typer.Option(help="Form of the linear layers, as in `qaq up`.")] = None,
    preset: options.Preset = None,
    target_bits: options.TargetBits = None,
    address: Address = None,
) -> None:
    """Starts workers of another model. Options that are not given are those of the stack's first model."""
    from services.cluster import control

    stack = where(address)
    changes = options.given(device=device, dtype=dtype, weights=weights, preset=preset, target_bits=target_bits)
    with starting() as report:
        name = control.add(stack, options.found(model), workers, changes, report)
    screen.print(f"{name} is served.", markup=False, highlight=False)


def remove(
    model: Name,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds for its streams to end; what runs then ends with an error.")
    ] = PATIENCE_S,
    address: Address = None,
) -> None:
    """Removes a model: nothing new is taken, its streams end, then its workers stop, and its sessions have ended."""
    from services.cluster import control

    stack = where(address)
    with starting() as report:
        finished = control.remove(stack, model, wait, report)
    late = "" if finished else f" Streams that still ran after {wait:g} s have ended with an error."
    screen.print(f"{model} is not served any more.{late}", markup=False, highlight=False)
