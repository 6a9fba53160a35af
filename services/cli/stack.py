"""Commands for the stack of this machine: up, status, scale, drain, down."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from services.cli.options import (
    Compiled,
    Device,
    Dtype,
    JsonPath,
    Model,
    StackPreset,
    TargetBits,
    Weights,
    Workers,
    model_or_default,
)
from services.cli.terminal import screen, size, starting

if TYPE_CHECKING:
    from services.cluster.state import StackState
    from services.cluster.status import StackStatus

DRAIN_TIMEOUT_S = 60.0


def register(app: typer.Typer) -> None:
    for command in (up, status, scale, drain, down):
        app.command(rich_help_panel="Stack")(command)


def up(
    model: Model = None,
    workers: Workers = 1,
    originals: Annotated[int, typer.Option(min=1, help="Number of cache services.")] = 1,
    port: Annotated[int, typer.Option(help="The router's port; 0 takes any free port.")] = 7700,
    http_port: Annotated[
        int | None, typer.Option(help="Also serve OpenAI's API on this port; 0 takes any free port.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    compiled: Compiled = False,
    preset: StackPreset = "balanced",
    target_bits: TargetBits = None,
    keys: Annotated[
        bool, typer.Option(help="Ask callers for a key; the stack makes one, which `qaq` commands use by themselves.")
    ] = True,
) -> None:
    """Starts Ray, Redis, cache services, workers and the router, and returns when they are ready.

    QAQ_REDIS_URL names a Redis server to use. Without it, an embedded server is started.
    """
    from services.cluster import control
    from services.cluster.keys import StackKeys
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
            "keys": keys,
        }
    )
    with starting() as report:
        running = control.up(settings, report)
    screen.print(f"The router is at [bold]{running.router}[/]. Try: qaq chat", highlight=False)
    if running.gateway is not None:
        screen.print(f"OpenAI's API is at [bold]http://{running.gateway}/v1[/].", highlight=False)
    if running.keys is not None:
        path = StackKeys(running.keys).path("client")
        screen.print("Other clients need its key:", highlight=False)
        screen.print(f'  export QAQ_API_KEY="$(cat {path})"', soft_wrap=True, highlight=False)
        if running.gateway is not None:
            url = f"http://{running.gateway}/v1"
            line = f'  export OPENAI_API_KEY="$(cat {path})" OPENAI_BASE_URL={url}'
            screen.print(line, soft_wrap=True, highlight=False)


def status(
    json_path: JsonPath = None,
) -> None:
    """Shows the servers and their load."""
    from google.protobuf.json_format import MessageToDict

    from services.cluster.status import stack_status

    running = _running()
    found = asyncio.run(stack_status(running.redis["url"]))
    if json_path is not None:
        status = {
            "routers": found.routers,
            "workers": {a: MessageToDict(w) if w else None for a, w in found.workers.items()},
            "originals": {a: MessageToDict(o) if o else None for a, o in found.originals.items()},
            "redis": running.redis["description"],
            "keys": str(running.keys) if running.keys else None,
        }
        json_path.write_text(json.dumps(status, indent=1) + "\n")
    screen.print(_table(running, found))


def scale(workers: Annotated[int, typer.Option(min=1, max=64, help="Number of workers to run.")]) -> None:
    """Starts or stops workers."""
    from services.cluster import control

    running = _running()
    with starting() as report:
        control.scale(running, workers, report)


def drain(
    worker: Annotated[str, typer.Argument(help="The worker's host:port, as `qaq status` shows it.")],
) -> None:
    """Moves a worker's sessions to other workers, so that it can be stopped without interrupting a stream."""
    import grpc
    from qaq.v1 import worker_pb2, worker_pb2_grpc

    with grpc.insecure_channel(worker) as channel, screen.status("draining"):
        reply = worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest(), timeout=DRAIN_TIMEOUT_S)
    screen.print(f"Moved {reply.moved} running generations. The process can be stopped now.")


def down() -> None:
    """Stops the stack and all processes it started."""
    from services.cluster import control, state

    running = state.load()
    if running is None:
        screen.print("No stack is running.")
        return
    with screen.status("stopping"):
        control.down(running)
    screen.print("Stopped.")


def _running() -> StackState:
    from services.cluster import state
    from services.cluster.state import StackError

    running = state.load()
    if running is None:
        raise StackError("no stack is running; start one with `qaq up`")
    if not running.alive:
        raise StackError("the stack's process has died; clean up with `qaq down`, then `qaq up`")
    return running


def _table(running: StackState, found: StackStatus) -> Table:
    table = Table(title=running.settings.model, title_justify="left")
    for column in ("role", "address", "state"):
        table.add_column(column)
    for address in found.routers:
        table.add_row("router", address, "running")
    if running.gateway is not None:
        table.add_row("gateway", running.gateway, "")
    for address, worker in found.workers.items():
        load = (
            f"{worker.running} running, {worker.waiting} waiting, {worker.sessions} sessions, "
            f"{size(worker.kv_bytes)} of cache"
            if worker
            else "does not answer"
        )
        table.add_row("worker", address, load)
    for address, store in found.originals.items():
        stored = f"{store.pages} pages, {size(store.bytes)}" if store else "does not answer"
        table.add_row("originals", address, stored)
    table.add_row("redis", "", running.redis["description"])
    without = "of QAQ_TENANTS_FILE" if running.settings.keys else "not asked for"
    table.add_row("keys", "", f"in {running.keys}" if running.keys else without)
    return table
