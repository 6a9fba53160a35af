"""Commands for the stack of this machine: up, status, scale, down."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from services.cli.terminal import screen, size, starting

if TYPE_CHECKING:
    from services.cluster.state import StackState
    from services.cluster.status import StackStatus

DRAIN_TIMEOUT_S = 60.0

Model = Annotated[
    str | None,
    typer.Option(envvar="QAQ_MODEL", help="Local directory, GGUF file or hub id; default: SmolLM2-135M."),
]
Workers = Annotated[int, typer.Option(min=1, help="How many workers.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<n>.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Weights = Annotated[
    str, typer.Option(envvar="QAQ_WEIGHTS", help="Of linear layers: auto, plain, float32, bfloat16, int8 or int4.")
]
Compiled = Annotated[
    bool, typer.Option("--compiled", envvar="QAQ_COMPILED", help="Decode steps go through torch.compile.")
]
Preset = Annotated[str, typer.Option(help="balanced, paper or exact.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write it there as JSON.")]
TargetBits = Annotated[float | None, typer.Option(help="Mean bits per element of a cache; default: the preset's.")]


def register(app: typer.Typer) -> None:
    for command in (up, status, scale, drain, down):
        app.command(rich_help_panel="Stack")(command)


def up(
    model: Model = None,
    workers: Workers = 1,
    originals: Annotated[int, typer.Option(min=1, help="How many cache services.")] = 1,
    port: Annotated[int, typer.Option(help="The router's port; 0 takes any free one.")] = 7700,
    http_port: Annotated[int | None, typer.Option(help="Serve OpenAI's API there, too; 0 takes any free port.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    compiled: Compiled = False,
    preset: Preset = "balanced",
    target_bits: TargetBits = None,
) -> None:
    """Starts Ray, Redis, cache services, workers and the router, and returns when they serve.

    QAQ_REDIS_URL names a Redis server to use; without it an embedded one is started.
    """
    from services.cluster import control
    from services.cluster.state import StackSettings

    settings = StackSettings.model_validate(
        {
            "model": model_or_default(model),
            "workers": workers,
            "originals": originals,
            "port": port,
            "http_port": http_port,
            "device": device,
            "dtype": dtype,
            "weights": weights,
            "compiled": compiled,
            "preset": preset,
            "target_bits": target_bits,
        }
    )
    with starting() as report:
        running = control.up(settings, report)
    screen.print(f"The router is at [bold]{running.router}[/]. Try: qaq chat", highlight=False)
    if running.gateway is not None:
        screen.print(f"OpenAI's API is at [bold]http://{running.gateway}/v1[/].", highlight=False)


def status(
    json_path: JsonPath = None,
) -> None:
    """Shows who runs and how busy they are."""
    from google.protobuf.json_format import MessageToDict

    from services.cluster.status import survey

    running = _running()
    seen = asyncio.run(survey(running.redis["url"]))
    if json_path is not None:
        found = {
            "routers": seen.routers,
            "workers": {a: MessageToDict(w) if w else None for a, w in seen.workers.items()},
            "originals": {a: MessageToDict(o) if o else None for a, o in seen.originals.items()},
            "redis": running.redis["description"],
        }
        json_path.write_text(json.dumps(found, indent=1) + "\n")
    screen.print(_table(running, seen))


def scale(workers: Annotated[int, typer.Option(min=1, max=64, help="How many workers there should be.")]) -> None:
    """Starts or stops workers."""
    from services.cluster import control

    running = _running()
    with starting() as report:
        control.scale(running, workers, report)


def drain(
    worker: Annotated[str, typer.Argument(help="Its host:port, as `qaq status` shows it.")],
) -> None:
    """Makes a worker hand over its sessions, so that it can be stopped without anybody noticing."""
    import grpc
    from qaq.v1 import worker_pb2, worker_pb2_grpc

    with grpc.insecure_channel(worker) as channel, screen.status("draining"):
        reply = worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest(), timeout=DRAIN_TIMEOUT_S)
    screen.print(f"Handed over {reply.moved} running generations; stop the process now.")


def down() -> None:
    """Stops the stack and everything it started."""
    from services.cluster import control, state

    running = state.load()
    if running is None:
        screen.print("No stack is running.")
        return
    with screen.status("stopping"):
        control.down(running)
    screen.print("Stopped.")


def model_or_default(model: str | None) -> str:
    """A model's source; a file or directory by its whole path, since servers may run elsewhere.

    Raises:
        ModelLoadError: none was named and the default model's package is not installed.
    """
    if model is None:
        from qaq_core.models import default_model_path

        return str(default_model_path())
    return os.path.abspath(model) if os.path.exists(model) else model


def _running() -> StackState:
    from services.cluster import state
    from services.cluster.state import StackError

    running = state.load()
    if running is None:
        raise StackError("no stack is running; start one with `qaq up`")
    if not running.alive:
        raise StackError("the stack's process has died; clean up with `qaq down`, then `qaq up`")
    return running


def _table(running: StackState, seen: StackStatus) -> Table:
    table = Table(title=running.settings.model, title_justify="left")
    for column in ("role", "address", "state"):
        table.add_column(column)
    for address in seen.routers:
        table.add_row("router", address, "serves")
    if running.gateway is not None:
        table.add_row("gateway", running.gateway, "")
    for address, worker in seen.workers.items():
        busy = (
            f"{worker.running} running, {worker.waiting} waiting, {worker.sessions} sessions, "
            f"{size(worker.kv_bytes)} of cache"
            if worker
            else "does not answer"
        )
        table.add_row("worker", address, busy)
    for address, store in seen.originals.items():
        kept = f"{store.pages} pages, {size(store.bytes)}" if store else "does not answer"
        table.add_row("originals", address, kept)
    table.add_row("redis", "", running.redis["description"])
    return table
