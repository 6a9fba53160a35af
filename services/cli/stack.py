"""Commands for a stack, of this machine or on a Ray cluster: up, scale, drain, restart, down."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from services.cli.options import (
    Compiled,
    Device,
    Dtype,
    Models,
    StackPreset,
    StackTargetBits,
    Weights,
    Workers,
    models_or_default,
)
from services.cli.running import Address, running_or, where
from services.cli.terminal import screen, starting, warn_of_environment

if TYPE_CHECKING:
    from services.cluster.state import StackState

DRAIN_TIMEOUT_S = 60.0

MaxWorkers = Annotated[
    int | None,
    typer.Option(min=1, max=64, help="Start workers up to this many while requests wait, and stop them when idle."),
]


def register(app: typer.Typer) -> None:
    for command in (up, scale, drain, restart, down):
        app.command(rich_help_panel="Stack")(command)


def up(
    model: Models = None,
    workers: Workers = 1,
    max_workers: MaxWorkers = None,
    idle_seconds: Annotated[
        float, typer.Option(min=1, help="With --max-workers: after so long without need one worker less.")
    ] = 60,
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
    address: Annotated[
        str | None,
        typer.Option(help="Start it on this Ray cluster: host:port of its head, or ray://host:port from elsewhere."),
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="With --address: a Redis that all nodes reach; default: QAQ_REDIS_URL.")
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(help="With --address: another name of router and gateway, for their certificates; repeatable."),
    ] = None,
    worker_cpus: Annotated[
        float, typer.Option(min=0, help="With --address: CPUs that each worker reserves of its node; 0 reserves none.")
    ] = 0,
) -> None:
    """Starts Ray, Redis, cache services, workers and the router, and returns when they are ready.

    QAQ_REDIS_URL names a Redis server to use. Without it, an embedded server is started. With --address Ray and Redis
    are there already, on any number of machines.
    """
    if address is None and (redis_url or host or worker_cpus):
        raise typer.BadParameter("--redis-url, --host and --worker-cpus are for a Ray cluster; give --address too")
    if https and (http_port is None or not tls):
        given = "without --no-tls" if not tls else "with --http-port"
        raise typer.BadParameter(f"--https is for the gateway, by the stack's certificates; give it {given}")
    with starting() as report:
        report("stack", "reading the settings", None)  # the imports take seconds on a slow machine
        from services.cluster import control, state
        from services.cluster.keys import StackKeys
        from services.cluster.state import StackSettings

        first, *more = models_or_default(model)
        how = {
            "workers": workers,
            "max_workers": max_workers,
            "idle_s": idle_seconds,
            "device": device,
            "dtype": dtype,
            "weights": weights,
            "compiled": compiled,
            "preset": preset,
            "target_bits": target_bits,
        }
        settings = StackSettings.model_validate(
            {
                "model": first,
                **how,
                "more": [{"model": each, **how} for each in more],
                "originals": originals,
                "port": port,
                "http_port": http_port,
                "tls": tls,
                "https": https,
                "keys": keys,
                "worker_cpus": worker_cpus,
            }
        )
        warn_of_environment(stack=True)
        if address is None:
            running = control.up(settings, report)
        else:
            from services.cluster import deploy

            running = deploy.up(settings, address, redis_url, host or (), report)
    screen.print(f"The router is at [bold]{running.router}[/]. Try: qaq chat", highlight=False)
    if running.gateway is not None:
        scheme = "https" if https else "http"
        screen.print(f"OpenAI's API is at [bold]{scheme}://{running.gateway}/v1[/].", highlight=False)
        screen.print(f"Its cache inspector is at [bold]{scheme}://{running.gateway}/[/].", highlight=False)
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


def scale(
    workers: Annotated[int, typer.Option(min=1, max=64, help="Number of workers to run.")],
    max_workers: MaxWorkers = None,
    model: Annotated[str, typer.Option(help="Whose workers, by the model's name; default: the first model's.")] = "",
    address: Address = None,
) -> None:
    """Starts or stops workers of a model, or lets their number follow its load."""
    from services.cluster import control

    if max_workers is not None and max_workers < workers:
        raise typer.BadParameter("it is less than --workers", param_hint="--max-workers")
    stack = where(address)
    with starting() as report:
        control.scale(stack, workers, report, model, max_workers)


def drain(
    target: Annotated[
        str, typer.Argument(metavar="WORKER|NODE", help="A worker's host:port, or a node's id or address.")
    ],
    address: Address = None,
) -> None:
    """Moves sessions to other workers, without interrupting a stream, so that a worker or a node can be stopped.

    Workers of a stack are stopped, too. Others are started in their place, and before; on a drained node, none.
    """
    from qaq.v1 import worker_pb2, worker_pb2_grpc

    from services.cli.identity import identity
    from services.cluster import control, restarts, state
    from services.cluster.status import addresses
    from services.common.addresses import check_address
    from services.common.channel import open_blocking_channel

    def of_stack(running: StackState) -> bool:
        if running.address is not None:
            return True
        recorded = (record.address for record in restarts.records(running.directory).values())
        return target in asyncio.run(addresses(running.access)) or target in recorded  # one that hangs leaves the first

    running = state.load() if address is None else None
    if address is not None or (running is not None and running.alive and of_stack(running)):
        with starting() as report:
            report(target, "draining", None)
            moved = control.drain(address or running_or(running), target, report)
            report(target, "stopped", 1.0)
        screen.print(f"Moved {moved} running generations. {_stopped(target)}")
        return
    check_address(target)
    with (
        screen.status("draining"),
        open_blocking_channel(target, identity(target), "worker") as channel,
    ):
        stub = worker_pb2_grpc.WorkerStub(channel)
        moved = int(stub.Drain(worker_pb2.DrainRequest(), timeout=DRAIN_TIMEOUT_S).moved)
    screen.print(f"Moved {moved} running generations. The process can be stopped now.")


def restart(
    workers: Annotated[
        Literal["workers"], typer.Argument(help="What is replaced: the workers, one after the other.")
    ] = "workers",
    address: Address = None,
) -> None:
    """Replaces all workers, one after the other, without interrupting a stream: a rolling update.

    The new ones run the code and read the files that are there now.
    """
    from services.cluster import control

    stack = where(address)
    with starting() as report:
        moved = control.restart(stack, report)
    screen.print(f"Moved {moved} running generations. All workers are new.")


def down(address: Address = None) -> None:
    """Stops the stack and all processes it started."""
    from services.cluster import control, deploy, state

    running = state.load() if address is None else None
    address = address or (running.address if running else None)
    with screen.status("stopping"):
        stopped = control.down() if address is None else deploy.down(address)
    screen.print("Stopped." if stopped else "No stack is running.")


def _stopped(target: str) -> str:
    return "The worker is stopped." if ":" in target else "The workers of this node are stopped, and none starts there."
