"""`qaq bench`: speed measurements."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qaq_eval.cli.bench_elastic import elastic
from qaq_eval.cli.bench_gpu import gpu
from qaq_eval.cli.bench_identity import identity
from qaq_eval.cli.bench_lookup import lookup
from qaq_eval.cli.bench_prefill import prefill
from qaq_eval.cli.bench_prefix import prefix
from qaq_eval.cli.bench_serve import serve
from qaq_eval.cli.bench_store import store
from qaq_eval.cli.bench_weights import weights as bench_weights
from services.cli.options import Compiled, Device, Dtype, JsonPath, Model, Weights, model_or_default
from services.cli.terminal import progress_line, screen, size

if TYPE_CHECKING:
    from qaq_eval.speed import DecodeSpeed
    from qaq_eval.speed.attention import AttentionSpeed
    from qaq_eval.speed.encode import EncodeSpeed
    from qaq_eval.speed.step_parts import StepPart

CACHES = "balanced,balanced/reference"
SHAPES = "9/3/64/4096,12/2/128/16384,32/8/128/16384"


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
    bench.command()(decode)
    bench.command()(prefill)
    bench.command()(attention)
    bench.command()(encode)
    bench.command()(gpu)
    bench.command("weights")(bench_weights)
    bench.command()(serve)
    bench.command()(elastic)
    bench.command()(prefix)
    bench.command()(lookup)
    bench.command()(identity)
    bench.command()(store)
    app.add_typer(bench, name="bench")


def decode(
    model: Model = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 1600,
    steps: Annotated[int, typer.Option(min=2, help="Tokens decoded from each cache; the first is not timed.")] = 48,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    caches: Annotated[
        str,
        typer.Option(
            help="Separated by commas: presets, with -in-time for exceptions in time, a kernel after / "
            "(balanced/reference), and /modules for steps through transformers' modules; dynamic-bf16, quanto-int4, "
            "hqq-int4, llama.cpp-f16, llama.cpp-q8_0, llama.cpp-q4_0."
        ),
    ] = CACHES,
    text: Annotated[Path | None, typer.Option(help="Text to decode; default: the built-in text.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    weights: Weights = "plain",
    compiled: Compiled = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show the parts of a step of QAQ's caches.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Times decode steps of each cache and of transformers' DynamicCache, in turn."""
    import torch

    from qaq_core import calibration
    from qaq_core.base.errors import ConfigError
    from qaq_core.models import compile_layers, load_model
    from qaq_eval.quality import builtin_text
    from qaq_eval.speed import decode_speed

    names = [name.strip() for name in caches.split(",") if name.strip()]
    with progress_line() as report, calibration.shown(report):
        if "dynamic-bf16" in names and (weights != "plain" or compiled):
            raise ConfigError("dynamic-bf16 converts the weights itself: leave out --weights and --compiled")
        progress = partial(_stage, report)
        loaded = load_model(model_or_default(model), device, dtype, progress, weights)
        if compiled:
            compile_layers(loaded.model, progress)
        content = builtin_text() if text is None else text.read_text(encoding="utf-8")
        ids = loaded.tokenizer(content, return_tensors="pt").input_ids
        if ids.shape[1] < context + steps:
            raise ConfigError(f"the text has {ids.shape[1]} tokens; take a shorter context or a longer --text")
        # Each sequence begins at another place in the text.
        ids = torch.cat([ids.roll(-37 * i, 1)[:, : context + steps] for i in range(batch)])
        ids = ids.to(device)
        parts: list[StepPart] | None = [] if profile else None
        rows = decode_speed(loaded.model, loaded.fingerprint, ids, steps, names, report, loaded.source, parts)
    screen.print(_table(rows), highlight=False)
    if parts:
        screen.print(_parts_table(parts), highlight=False)
    if json_path is not None:
        about = {"model": loaded.name, "dtype": str(loaded.dtype).removeprefix("torch.")}
        profiled = {} if parts is None else {"profile": [asdict(row) for row in parts]}
        _write(json_path, {**about, "weights": weights, "compiled": compiled, **profiled}, rows)


def attention(
    shapes: Annotated[str, typer.Option(help="Query heads/KV heads/head_dim/tokens, separated by commas.")] = SHAPES,
    repeat: Annotated[int, typer.Option(min=1, help="Calls of each; the median is reported.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and of the kernel.")] = 1,
    json_path: JsonPath = None,
) -> None:
    """Times decode attention over one layer's packed tokens and dense attention in torch, with cold CPU caches."""
    import torch

    from qaq_eval.speed.attention import attention_speed, parse_shapes

    try:
        wanted = parse_shapes(shapes)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shapes") from error
    torch.set_num_threads(threads)
    with progress_line() as report:
        rows = [row for shape, tokens in wanted for row in attention_speed(shape, tokens, repeat, report)]
    fastest = rows[0].backend
    table = Table("shape", "tokens", "backend", "microseconds", f"over {fastest}", "error")
    for row in rows:
        over = 1 / row.ratio_to[fastest] if fastest in row.ratio_to else 1.0
        table.add_row(
            row.shape, str(row.tokens), row.backend, f"{row.microseconds:.0f}", f"{over:.1f}", f"{row.error:.1e}"
        )
    screen.print(table, highlight=False)
    if json_path is not None:
        _write(json_path, {"packing": "bits of keys and values: 60% 2/2, 25% 3/2, 10% 4/4, 5% 8/8"}, rows)


def encode(
    shape: Annotated[str, typer.Option(help="Layers/KV heads/head_dim.")] = "30/3/64",
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of the prompt.")] = 4096,
    repeat: Annotated[int, typer.Option(min=1, help="Calls of each; the median is reported.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and of the kernel.")] = 1,
    json_path: JsonPath = None,
) -> None:
    """Times packing of random originals with the default preset's transform and codec, in torch and in C++."""
    import torch

    from qaq_eval.speed.encode import MEAN_BITS, encode_speed, parse_shape

    try:
        dims = parse_shape(shape)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shape") from error
    torch.set_num_threads(threads)
    with progress_line() as report:
        rows = encode_speed(dims, tokens, repeat, report)
    table = Table("what", "rows", "kernel", "milliseconds", "CPU", "faster than torch")
    for row in rows:
        times = (f"{row.milliseconds:.2f}", f"{row.cpu_milliseconds:.2f}", f"{row.ratio:.1f}")
        table.add_row(row.what, f"{row.rows:,}", row.kernel, *times)
    screen.print(table, highlight=False)
    if json_path is not None:
        _write(json_path, {"shape": shape, "tokens": str(tokens), "bits": f"{MEAN_BITS:.2f} an element"}, rows)


def _stage(report: Callable[[str, float | None], None], stage: str, share: float) -> None:
    """Reports a stage without its progress."""
    report(stage, None)


def _write(path: Path, about: dict[str, Any], rows: Sequence[DecodeSpeed | AttentionSpeed | EncodeSpeed]) -> None:
    import torch

    from qaq_core.kernels import load_library

    loaded = load_library()
    machine = {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "isa": loaded.qaq_isa().decode() if loaded else None,
    }
    path.write_text(json.dumps({**about, **machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _table(rows: list[DecodeSpeed]) -> Table:
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


def _parts_table(rows: list[StepPart]) -> Table:
    table = Table("cache", "part of a step", "CPU", "calls")
    for row in rows:
        table.add_row(row.cache, row.part, f"{row.milliseconds:.2f} ms", f"{row.calls:.1f}")
    return table
