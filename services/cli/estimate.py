"""`qaq estimate`: what a cache of QAQ would save, without loading a model."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.options import JsonPath
from services.cli.terminal import screen, size

if TYPE_CHECKING:
    from rich.table import Table

    from services.cli.model_size import ModelSize

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def register(app: typer.Typer) -> None:
    app.command()(estimate)


def estimate(
    model: Annotated[str, typer.Option(help="A well-known model's name, or a config.json or its directory.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of a session.")] = 4096,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions at a time.")] = 1,
    gpu_memory: Annotated[str | None, typer.Option(help="Of one GPU, as 80GB or 24GiB.")] = None,
    weights: Annotated[str | None, typer.Option(help="Bytes of the weights; default: 16 bits a parameter.")] = None,
    kl: Annotated[float | None, typer.Option(min=0, help="The most KL divergence, in nats a token.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: bfloat16, float16 or float32.")] = "bfloat16",
    json_path: JsonPath = None,
) -> None:
    """Estimates the bytes of caches at fp16, fp8 and in QAQ, of originals in Redis, and how many sessions fit.

    QAQ's compression and its KL divergence are those of recorded results, which the table names. They were measured on
    small models, and may be others on yours: `qaq eval` measures it.
    """
    from qaq_core.base.errors import ConfigError
    from services.cli.model_size import model_size
    from services.cli.savings import ITEM_BYTES, cache_room

    if dtype not in ITEM_BYTES:
        raise ConfigError(f"--dtype {dtype} is unknown; take {', '.join(ITEM_BYTES)}")
    shape, room = model_size(model), None
    if gpu_memory is not None:
        room = cache_room(byte_count(gpu_memory, "--gpu-memory"), _weight_bytes(shape, weights, ITEM_BYTES[dtype]))
    facts = estimated(shape, context, sessions, dtype, kl, room)
    screen.print(_table(shape, facts), highlight=False)
    at_rest = ", ".join(f"{size(value)} {form}" for form, value in facts["redis_bytes"].items())
    screen.print(f"Originals of all sessions in Redis ({dtype}): {at_rest}.", highlight=False)
    if json_path is not None:
        json_path.write_text(json.dumps({"model": asdict(shape), **facts}, indent=1) + "\n")


def estimated(
    shape: ModelSize, context: int, sessions: int, dtype: str, kl: float | None = None, room: float | None = None
) -> dict[str, Any]:
    """The figures, as JSON has them."""
    from services.cli.savings import savings, stored_token_bytes, token_bytes

    rows = savings(shape, context, sessions, dtype, kl, room)
    forms = ("plain", "lossless", "int8")
    tokens = context * sessions
    return {
        "context": context,
        "sessions": sessions,
        "dtype": dtype,
        "originals_bytes_per_token": token_bytes(shape, dtype),
        "redis_bytes": {form: round(tokens * stored_token_bytes(shape, dtype, form)) for form in forms},
        "caches": [asdict(row) for row in rows],
    }


def byte_count(text: str, option: str) -> float:
    """Bytes of "80GB", "24 GiB" or "1e9".

    Raises:
        typer.BadParameter: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is no number of bytes; write it as 80GB or 24GiB", param_hint=option)
    return float(match[1]) * _UNITS[match[2]]


def _weight_bytes(shape: ModelSize, weights: str | None, item_bytes: int) -> float:
    from qaq_core.base.errors import ConfigError

    if weights is not None:
        return byte_count(weights, "--weights")
    if shape.parameters is None:
        raise ConfigError(f"{Path(shape.source).name} does not tell how large the weights are; give --weights")
    return shape.parameters * item_bytes


def _table(shape: ModelSize, facts: dict[str, Any]) -> Table:
    from rich.table import Table

    sliding = f", {shape.sliding_layers} of them with a window of {shape.window:,}" if shape.sliding_layers else ""
    title = (
        f"{shape.name}: {shape.layers} layers{sliding}, {shape.kv_heads} KV heads of {shape.head_dim}; "
        f"{facts['sessions']:,} sessions of {facts['context']:,} tokens"
    )
    table = Table("cache", "a session", "all", "sessions that fit", "network a token", "KL", "measured on", title=title)
    for row in facts["caches"]:
        table.add_row(
            row["cache"],
            size(row["session_bytes"]),
            size(row["all_bytes"]),
            "" if row["fits"] is None else f"{row['fits']:,}",
            size(row["network_bytes"]) if row["network_bytes"] else "",
            "" if row["kl"] is None else f"{row['kl']:.4f}",
            row["measured_on"],
        )
    return table
