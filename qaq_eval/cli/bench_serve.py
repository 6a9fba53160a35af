"""`qaq bench serve`: a load test of a stack."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import SecretStr
from rich.table import Table

from qaq_core.base.errors import ConfigError
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
from services.cli.terminal import progress_line, screen, size, starting

if TYPE_CHECKING:
    from qaq_eval.serving.figures import Percentiles
    from qaq_eval.serving.serve import ServeResult


def serve(
    model: Model = None,
    workers: Workers = 1,
    clients: Annotated[int, typer.Option(min=1, help="Clients that send the mix, each one request at a time.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Requests in the mix.")] = 32,
    trace: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Replay a JSONL file of arrivals instead of the mix."),
    ] = None,
    streams: Annotated[int, typer.Option(min=0, help="Equal concurrent streams; 0 skips this phase.")] = 16,
    stream_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each stream.")] = 48,
    regex: Annotated[
        str, typer.Option(help="Constraint whose cost is measured, such as '[a-z ]{1000}'; empty for none.")
    ] = "",
    memory_sessions: Annotated[
        int, typer.Option(min=0, help="Sessions to open and close while memory is measured; 0 skips this phase.")
    ] = 100,
    seed: Annotated[int, typer.Option(help="Random seed of the mix.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    compiled: Compiled = False,
    preset: StackPreset = "balanced",
    target_bits: TargetBits = None,
    router: Annotated[
        str | None, typer.Option(help="host:port of a running stack; QAQ_REDIS_URL names its Redis.")
    ] = None,
    chaos: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            min=0,
            help="Instead of measuring: kill and stop workers, cache service and router at random for so long, and "
            "check what --clients streams of up to --stream-tokens tokens lose. Exit code 1 if something.",
        ),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Runs a load test of a stack and shows what the clients measured.

    Without --router it starts a stack of its own, whose workers decode as many sequences at a time as there are
    clients or streams, unless QAQ_MAX_SEQUENCES is set.
    """
    from qaq_eval.serving.arrivals import mix, read_trace
    from qaq_eval.serving.serve import Plan, measure
    from services.cli.identity import identity
    from services.cli.keys import caller_key
    from services.cluster import control
    from services.cluster.state import StackSettings

    if chaos is not None and router is not None:
        raise ConfigError("--chaos kills processes, and only those of a stack of its own: leave out --router")
    cache = {"preset": preset} | ({} if target_bits is None else {"target_bits": target_bits})
    plan = Plan(
        scripts=mix(requests, seed) if trace is None else read_trace(trace),
        clients=clients if trace is None else None,
        streams=streams,
        stream_tokens=stream_tokens,
        memory_sessions=memory_sessions,
        cache=cache,
        seed=seed,
        regex=regex,
    )
    with contextlib.ExitStack() as stack:
        if router is None:
            os.environ.setdefault("QAQ_MAX_SEQUENCES", str(max(clients, streams)))
            settings = StackSettings.model_validate(
                {
                    "model": model_or_default(model),
                    "port": 0,
                    "workers": workers,
                    "device": device,
                    "dtype": dtype,
                    "weights": weights,
                    "compiled": compiled,
                    "preset": preset,
                }
            )
            with starting() as report:
                running = stack.enter_context(control.attached(settings, report))
            if chaos is not None:
                from qaq_eval.cli.bench_chaos import run

                run(running, chaos, clients, stream_tokens, preset, seed, json_path)
                return
            router, redis, who = running.router, running.redis["url"], running.access.identity("router")
            key = running.key("client")
        else:
            who, key = identity(router), caller_key(router)
            redis = os.environ.get("QAQ_REDIS_URL")
        with progress_line() as progress:
            result = asyncio.run(measure(router, SecretStr(redis) if redis else None, plan, progress, who, key))
    screen.print(_table(result), highlight=False)
    if json_path is not None:
        json_path.write_text(result.model_dump_json(indent=1) + "\n")


def _table(result: ServeResult) -> Table:
    table = Table(show_header=False, title="Load test", title_justify="left")
    source = "trace" if result.clients is None else f"{result.clients} clients"
    failed = ", ".join(f"{count} {name}" for name, count in result.errors.items()) or "no errors"
    table.add_row(source, f"{result.requests} requests, {result.sessions} sessions, {failed}")
    table.add_row("tokens", f"{result.tokens_per_second:.1f} per second")
    table.add_row("first token", _percentiles(result.ttft_ms))
    table.add_row("between tokens", _percentiles(result.itl_ms))
    if (cost := result.router) is not None:
        inside = f" ({cost.inside_ms:.2f} ms of it inside the router)" if cost.inside_ms is not None else ""
        table.add_row("router", f"adds {cost.way_ms:.2f} ms to the median latency of a token{inside}")
    if result.kv_bytes_peak is not None and result.sessions_per_gb is not None:
        table.add_row("caches", f"{size(result.kv_bytes_peak)} at most, {result.sessions_per_gb:.0f} sessions per GB")
    if (equal := result.streams) is not None:
        rates = f"{equal.tokens_per_second:.1f} tokens/s, one alone {equal.tokens_per_second_alone:.1f}"
        table.add_row(f"{equal.streams} streams", f"{rates}: [bold]{equal.ratio:.2f}x[/]")
        if equal.slowest_to_median is not None:
            table.add_row("", f"the slowest takes {equal.slowest_to_median:.2f} times the median stream's time")
    if (paid := result.constraint) is not None:
        ratios = [with_it / free for with_it, free in zip(paid.constrained_ms, paid.free_ms, strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds"
        table.add_row("constraint", f"a token takes {paid.ratio:.3f} times as long ({spread})")
    if (memory := result.memory) is not None:
        for process in memory.processes:
            growth = f"{size(process.warm)} after {memory.warm_sessions} sessions, {size(process.end)} after"
            table.add_row(process.process, f"{growth} {memory.sessions}")
    return table


def _percentiles(figures: Percentiles) -> str:
    shown = ((name, getattr(figures, name)) for name in ("p50", "p95", "p99"))
    return ", ".join(f"{name} {value:.0f} ms" for name, value in shown if value is not None) or "none"
