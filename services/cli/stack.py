"""Commands for the stack of this machine: up, status, scale, drain, down."""

from __future__ import annotations

import asyncio
import json
import time
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
    StackTargetBits,
    Weights,
    Workers,
    model_or_default,
)
from services.cli.terminal import screen, size, starting, warn_of_environment

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
    port: Annotated[int, typer.Option(envvar="QAQ_PORT", help="The router's port; 0 takes any free port.")] = 7700,
    http_port: Annotated[
        int | None,
        typer.Option(envvar="QAQ_HTTP_PORT", help="Also serve OpenAI's API on this port; 0 takes any free port."),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    compiled: Compiled = False,
    preset: StackPreset = "balanced",
    target_bits: StackTargetBits = None,
    tls: Annotated[
        bool, typer.Option(help="Make certificates for this stack, and use them between servers and for gRPC.")
    ] = True,
    https: Annotated[
        bool, typer.Option("--https", help="Use them for OpenAI's API too, which is plain on this machine otherwise.")
    ] = False,
    keys: Annotated[
        bool, typer.Option(help="Ask callers for a key; the stack makes one, which `qaq` commands use by themselves.")
    ] = True,
) -> None:
    """Starts Ray, Redis, cache services, workers and the router, and returns when they are ready.

    QAQ_REDIS_URL names a Redis server to use. Without it, an embedded server is started.
    """
    if https and (http_port is None or not tls):
        given = "without --no-tls" if not tls else "with --http-port"
        raise typer.BadParameter(f"--https is for the gateway, by the stack's certificates; give it {given}")
    with starting() as report:
        report("stack", "reading the settings", None)  # the imports take seconds on a slow machine
        from services.cluster import control, state
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
                "tls": tls,
                "https": https,
                "keys": keys,
            }
        )
        warn_of_environment(stack=True)
        running = control.up(settings, report)
    screen.print(f"The router is at [bold]{running.router}[/]. Try: qaq chat", highlight=False)
    if running.gateway is not None:
        scheme = "https" if https else "http"
        screen.print(f"OpenAI's API is at [bold]{scheme}://{running.gateway}/v1[/].", highlight=False)
    if running.certificates is not None:
        screen.print(f"Its CA, for other clients, is {state.ca()}", highlight=False)
    if running.keys is not None:
        path = StackKeys(running.keys).path("client")
        screen.print("Other clients need its key:", highlight=False)
        screen.print(f'  export QAQ_API_KEY="$(cat {path})"', soft_wrap=True, highlight=False)
        if running.gateway is not None:
            url = f"{scheme}://{running.gateway}/v1"
            line = f'  export OPENAI_API_KEY="$(cat {path})" OPENAI_BASE_URL={url}'
            screen.print(line, soft_wrap=True, highlight=False)


def status(
    json_path: JsonPath = None,
) -> None:
    """Shows the servers and their load."""
    from google.protobuf.json_format import MessageToDict

    from services.cluster import restarts, state
    from services.cluster.status import stack_status

    running = _running()
    again = restarts.restarted(running.directory)
    found = asyncio.run(stack_status(running.access))
    if json_path is not None:
        status = {
            "routers": found.routers,
            "workers": {a: MessageToDict(w) if w else None for a, w in found.workers.items()},
            "draining": sorted(found.draining),
            "originals": {a: MessageToDict(o) if o else None for a, o in found.originals.items()},
            "redis": running.redis["description"],
            "restarts": {name: record.model_dump() for name, record in again.items()},
            "ca": str(state.ca()) if running.certificates else None,
            "keys": str(running.keys) if running.keys else None,
        }
        json_path.write_text(json.dumps(status, indent=1) + "\n")
    screen.print(_table(running, found))
    for name, record in again.items():
        times = "once" if record.restarts == 1 else f"{record.restarts} times, the last time"
        when = time.strftime("%H:%M:%S", time.localtime(record.ended))
        screen.print(f"{name} was started again {times} after {when}: {record.why}", highlight=False, soft_wrap=True)


def scale(workers: Annotated[int, typer.Option(min=1, max=64, help="Number of workers to run.")]) -> None:
    """Starts or stops workers."""
    from services.cluster import control

    running = _running()
    with starting() as report:
        control.scale(running, workers, report)


def drain(
    worker: Annotated[str, typer.Argument(help="The worker's host:port, as `qaq status` shows it.")],
) -> None:
    """Moves a worker's sessions to other workers, without interrupting a stream, so that it can be stopped.

    A worker of the stack of this machine is stopped, too. Another one is started in its place, and before.
    """
    from qaq.v1 import worker_pb2, worker_pb2_grpc

    from services.cli.identity import identity
    from services.cluster import control, restarts, state
    from services.cluster.status import addresses
    from services.common.addresses import check_address
    from services.common.channel import open_blocking_channel

    check_address(worker)

    def hand_over() -> int:
        with open_blocking_channel(worker, identity(worker), "worker") as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            return int(stub.Drain(worker_pb2.DrainRequest(), timeout=DRAIN_TIMEOUT_S).moved)

    def of_stack(running: StackState) -> bool:
        recorded = (record.address for record in restarts.records(running.directory).values())
        return worker in asyncio.run(addresses(running.access)) or worker in recorded  # one that hangs leaves the first

    running = state.load()
    if running is not None and running.alive and of_stack(running):
        with starting() as report:
            report(worker, "draining", None)
            moved = control.drain(running, worker, hand_over, report)
            report(worker, "stopped", 1.0)
        screen.print(f"Moved {moved} running generations. The worker is stopped.")
        return
    with screen.status("draining"):
        moved = hand_over()
    screen.print(f"Moved {moved} running generations. The process can be stopped now.")


def down() -> None:
    """Stops the stack and all processes it started."""
    from services.cluster import control

    with screen.status("stopping"):
        stopped = control.down()
    screen.print("Stopped." if stopped else "No stack is running.")


def _running() -> StackState:
    from services.cluster import claim, state
    from services.cluster.state import StackError

    running = state.load()
    owner = running or claim.current()
    if owner is None:
        last = f" (the last one ended by itself: {why})" if (why := state.why_it_ended()) else ""
        raise StackError(f"no stack is running{last}; start one with `qaq up`")
    if running is None and owner.alive:
        raise claim.taken(owner)
    if running is None or not running.alive:
        raise StackError("the stack's process has died; clean up with `qaq down`, then `qaq up`")
    return running


def _table(running: StackState, found: StackStatus) -> Table:
    from services.cluster import state

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
        if address in found.draining:
            load = f"draining: {load}" if worker and worker.running + worker.waiting else "drained; it can be stopped"
        table.add_row("worker", address, load)
    for address, store in found.originals.items():
        stored = f"{store.pages} pages, {size(store.bytes)}" if store else "does not answer"
        table.add_row("originals", address, stored)
    table.add_row("redis", "", running.redis["description"])
    if running.certificates is not None:
        table.add_row("CA", "", str(state.ca()))
    without = "of QAQ_TENANTS_FILE" if running.settings.keys else "not asked for"
    table.add_row("keys", "", f"in {running.keys}" if running.keys else without)
    return table
