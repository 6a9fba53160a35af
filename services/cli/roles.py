"""The roles as plain processes. What has no option here is set by the environment (`QAQ_…`)."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from services.cli.stack import Compiled, Weights

Host = Annotated[str | None, typer.Option(help="Address to bind.")]
Port = Annotated[int | None, typer.Option(help="Port to bind; 0 takes any free one.")]
AdvertiseHost = Annotated[str | None, typer.Option(help="Name by which others reach this process.")]
MetricsPort = Annotated[int | None, typer.Option(help="Serve Prometheus metrics there.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.")]
Model = Annotated[str | None, typer.Option(help="Local directory, GGUF file or hub id.")]


def register(app: typer.Typer) -> None:
    for command in (router, worker, originals, gateway):
        app.command(rich_help_panel="Roles")(command)


def router(
    host: Host = None,
    port: Port = None,
    advertise_host: AdvertiseHost = None,
    model: Model = None,
    metrics_port: MetricsPort = None,
    log_level: LogLevel = None,
) -> None:
    """Runs a router until it is told to stop."""
    from services.common.settings import RouterSettings
    from services.router.server import serve

    common = _common(host, port, advertise_host, metrics_port, log_level)
    asyncio.run(serve(RouterSettings(**_with_model(common, model))))


def worker(
    host: Host = None,
    port: Port = None,
    advertise_host: AdvertiseHost = None,
    model: Model = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<n>.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16 or bfloat16.")] = None,
    weights: Weights = "auto",
    compiled: Compiled = False,
    preset: Annotated[str | None, typer.Option(help="balanced, paper or exact.")] = None,
    target_bits: Annotated[float | None, typer.Option(help="Mean bits per element of a cache.")] = None,
    metrics_port: MetricsPort = None,
    log_level: LogLevel = None,
) -> None:
    """Runs a worker until it is told to stop."""
    from services.common.settings import WorkerSettings
    from services.worker.server import serve

    own: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "weights": weights,
        "compiled": compiled,
        "preset": preset,
        "target_bits": target_bits,
    }
    common = _common(host, port, advertise_host, metrics_port, log_level)
    given = {name: value for name, value in own.items() if value is not None}
    asyncio.run(serve(WorkerSettings(**_with_model(common, model), **given)))


def originals(
    host: Host = None,
    port: Port = None,
    advertise_host: AdvertiseHost = None,
    metrics_port: MetricsPort = None,
    log_level: LogLevel = None,
) -> None:
    """Runs a cache service until it is told to stop."""
    from services.common.settings import OriginalsSettings
    from services.originals.server import serve

    asyncio.run(serve(OriginalsSettings(**_common(host, port, advertise_host, metrics_port, log_level))))


def gateway(
    host: Host = None,
    port: Port = None,
    advertise_host: AdvertiseHost = None,
    router: Annotated[
        str | None, typer.Option(help="host:port, several by comma; else those that are registered.")
    ] = None,
    metrics_port: MetricsPort = None,
    log_level: LogLevel = None,
) -> None:
    """Runs an OpenAI-compatible HTTP server until it is told to stop."""
    from services.common.settings import GatewaySettings
    from services.gateway.server import serve

    own: dict[str, Any] = {} if router is None else {"router": router}
    asyncio.run(serve(GatewaySettings(**_common(host, port, advertise_host, metrics_port, log_level), **own)))


def _common(
    host: str | None, port: int | None, advertise_host: str | None, metrics_port: int | None, log_level: str | None
) -> dict[str, Any]:
    fields = {
        "host": host,
        "port": port,
        "advertise_host": advertise_host,
        "metrics_port": metrics_port,
        "log_level": log_level,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _with_model(settings: dict[str, Any], model: str | None) -> dict[str, Any]:
    """The model by option, else by QAQ_MODEL, else the one that a package brings."""
    import os

    from services.cli.stack import model_or_default

    return settings | {"model": model_or_default(model or os.environ.get("QAQ_MODEL") or None)}
