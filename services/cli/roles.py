"""The servers as plain processes. Settings without an option come from the environment (`QAQ_…`)."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from services.cli.options import (
    DEVICE,
    DTYPE,
    Compiled,
    Model,
    Preset,
    TargetBits,
    Weights,
    found,
    given,
    model_or_default,
)

Host = Annotated[str | None, typer.Option(help="Address to bind.")]
Port = Annotated[int | None, typer.Option(help="Port to bind; 0 takes any free port.")]
AdvertiseHost = Annotated[str | None, typer.Option(help="Host name under which other servers reach this process.")]
MetricsPort = Annotated[int | None, typer.Option(help="Serve Prometheus metrics on this port.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.")]


def register(app: typer.Typer) -> None:
    for command in (router, worker, originals, gateway):
        app.command(rich_help_panel="Roles")(command)


def router(
    host: Host = None,
    port: Port = None,
    advertise_host: AdvertiseHost = None,
    model: Annotated[
        str | None,
        typer.Option(envvar="QAQ_MODEL", help="The default model; default: the first that a worker serves."),
    ] = None,
    smg: Annotated[
        bool, typer.Option("--smg", envvar="QAQ_SMG", help="Also serve vLLM's engine protocol, for SMG in front.")
    ] = False,
    metrics_port: MetricsPort = None,
    log_level: LogLevel = None,
) -> None:
    """Runs a router until it is stopped."""
    from services.common.settings import RouterSettings
    from services.router.server import serve

    common = _common(host, port, advertise_host, metrics_port, log_level)
    asyncio.run(serve(RouterSettings(**common, model=found(model) if model else None, smg=smg)))


def worker(
    host: Host = None,
    port: Port = None,
    advertise_host: AdvertiseHost = None,
    model: Model = None,
    device: Annotated[str | None, DEVICE] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    weights: Weights = "auto",
    compiled: Compiled = False,
    preset: Preset = None,
    target_bits: TargetBits = None,
    metrics_port: MetricsPort = None,
    log_level: LogLevel = None,
) -> None:
    """Runs a worker until it is stopped."""
    from services.common.settings import WorkerSettings
    from services.worker.server import serve

    common = _common(host, port, advertise_host, metrics_port, log_level)
    own = given(device=device, dtype=dtype, weights=weights, compiled=compiled, preset=preset, target_bits=target_bits)
    asyncio.run(serve(WorkerSettings(**common, **own, model=model_or_default(model))))


def originals(
    host: Host = None,
    port: Port = None,
    advertise_host: AdvertiseHost = None,
    metrics_port: MetricsPort = None,
    log_level: LogLevel = None,
) -> None:
    """Runs a cache service until it is stopped."""
    from services.common.settings import OriginalsSettings
    from services.originals.server import serve

    asyncio.run(serve(OriginalsSettings(**_common(host, port, advertise_host, metrics_port, log_level))))


def gateway(
    host: Host = None,
    port: Port = None,
    advertise_host: AdvertiseHost = None,
    router: Annotated[
        str | None, typer.Option(help="host:port of routers, separated by commas; default: the registered ones.")
    ] = None,
    metrics_port: MetricsPort = None,
    log_level: LogLevel = None,
) -> None:
    """Runs an OpenAI-compatible HTTP server until it is stopped."""
    from services.common.settings import GatewaySettings
    from services.gateway.server import serve

    common = _common(host, port, advertise_host, metrics_port, log_level)
    asyncio.run(serve(GatewaySettings(**common, **given(router=router))))


def _common(
    host: str | None, port: int | None, advertise_host: str | None, metrics_port: int | None, log_level: str | None
) -> dict[str, Any]:
    return given(host=host, port=port, advertise_host=advertise_host, metrics_port=metrics_port, log_level=log_level)
