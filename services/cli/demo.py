"""`qaq demo`: starts a stack, answers a question about a long text, and shows what the cache did."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel
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
    model_or_default,
)
from services.cli.terminal import screen, size, starting, warn_of_environment

if TYPE_CHECKING:
    from services.cli.streaming import Generation
    from services.cluster.state import StackState
    from services.common.streams import Asked

# Chapters of the reference that is a part of Python. The answer is in the first one, far from the question.
CHAPTERS = ("with", "assert", "for", "while", "break", "continue")
QUESTION = 'According to the text above, what is the "with" statement used for? Explain it in a few sentences.'


class DemoResult(BaseModel):
    """What `--json` writes; its schema is services/schemas/demo.json."""

    text: str
    tokens: int
    tokens_per_second: float
    ttft_ms: float
    kv_bytes: int
    kv_bytes_fp16: int
    compression: float
    bits_histogram: dict[str, dict[str, int]]
    exceptions: int
    rows_requantized: int
    requantize_bytes: int
    staging_bytes: int
    originals_bytes_in_redis: int
    redis_server: str


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    model: Model = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Use the prompt in this file instead of the built-in question.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Maximum number of tokens to generate.")] = 160,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    compiled: Compiled = False,
    preset: StackPreset = "balanced",
    target_bits: StackTargetBits = None,
    json_path: JsonPath = None,
) -> None:
    """Starts a stack, answers a question about a long text, shows the figures, and stops everything."""
    prompt = prompt_file.read_text() if prompt_file else long_prompt()
    with contextlib.ExitStack() as stack:
        with starting() as report:
            report("stack", "reading the settings", None)  # the imports take seconds on a slow machine
            from services.cluster import control
            from services.cluster.state import StackSettings

            settings = StackSettings.model_validate(
                {
                    "model": model_or_default(model),
                    "port": 0,
                    "device": device,
                    "dtype": dtype,
                    "weights": weights,
                    "compiled": compiled,
                    "preset": preset,
                    "target_bits": target_bits,
                }
            )
            warn_of_environment(stack=True)
            running = stack.enter_context(control.attached(settings, report))
        result = measure(running, prompt, max_new_tokens)
        screen.print(_table(result), highlight=False)
    if json_path is not None:
        json_path.write_text(result.model_dump_json(indent=1) + "\n")


def long_prompt() -> str:
    """English text of about 1,800 tokens, and a question about its beginning."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[chapter].strip() for chapter in CHAPTERS) + f"\n\n{QUESTION}"


def measure(running: StackState, prompt: str, max_new_tokens: int) -> DemoResult:
    """Sends a prompt to a running stack, shows the answer as it arrives, and collects the figures."""
    from qaq.v1 import generate_pb2

    from services.cli.inference import inference
    from services.cli.streaming import follow
    from services.cluster.status import stack_status

    with inference(running.router, running.access.identity("operator"), running.key("client")) as client:
        model = client.once(lambda stub: stub.GetModel(generate_pb2.GetModelRequest(), timeout=30)).model
        sampling = {"temperature": 0.0, "repetition_penalty": 1.1}
        stop = {"max_new_tokens": max_new_tokens}
        asked: Asked = generate_pb2.GenerateRequest(prompt=prompt, sampling=sampling, stop=stop)
        if model.has_chat_template:
            messages = [{"role": "user", "content": prompt}]
            asked = generate_pb2.ChatRequest(messages=messages, sampling=sampling, stop=stop)
        with contextlib.closing(client.stream(asked)) as replies:
            generation = follow(replies)
    stores = asyncio.run(stack_status(running.access)).originals
    # All cache services use the same Redis.
    stored = max((store.bytes for store in stores.values() if store is not None), default=0)
    return _result(generation, stored, running.redis["description"])


def _result(generation: Generation, stored: int, redis: str) -> DemoResult:
    cache = generation.usage.cache
    return DemoResult(
        text=generation.text,
        tokens=generation.tokens,
        tokens_per_second=generation.tokens_per_second,
        ttft_ms=generation.first_token_s * 1000,
        kv_bytes=cache.kv_bytes,
        kv_bytes_fp16=cache.kv_bytes_fp16,
        compression=cache.kv_bytes_fp16 / max(cache.kv_bytes, 1),
        bits_histogram={
            "key": _histogram(cache.key_bits_histogram),
            "value": _histogram(cache.value_bits_histogram),
        },
        exceptions=cache.exceptions,
        rows_requantized=cache.rows_requantized,
        requantize_bytes=cache.requantize_bytes,
        staging_bytes=cache.staging_bytes,
        originals_bytes_in_redis=stored,
        redis_server=redis,
    )


def _histogram(counts: object) -> dict[str, int]:
    return {f"{width / 2:g}": count for width, count in sorted(dict(counts).items())}  # type: ignore[call-overload]


def _table(result: DemoResult) -> Table:
    table = Table(show_header=False, title="What the cache did", title_justify="left")
    table.add_row("decoding", f"{result.tokens_per_second:.1f} tokens/s, {result.tokens} tokens")
    table.add_row("first token", f"{result.ttft_ms / 1000:.2f} s")
    resident, plain = size(result.kv_bytes), size(result.kv_bytes_fp16)
    table.add_row("resident cache", f"{resident}, at fp16 {plain}: [bold]{result.compression:.2f}x[/] smaller")
    for side in ("key", "value"):
        counts = result.bits_histogram[side]
        total = max(sum(counts.values()), 1)
        shares = "  ".join(f"{bits} bit {100 * count / total:.0f}%" for bits, count in counts.items() if count)
        table.add_row(f"{side}s", shares)
    table.add_row("exceptions", f"{result.exceptions:,}")
    table.add_row(
        "re-quantized",
        f"{result.rows_requantized:,} rows from their originals, {size(result.requantize_bytes)}",
    )
    table.add_row("originals", f"{size(result.originals_bytes_in_redis)} in Redis, {size(result.staging_bytes)} staged")
    table.add_row("Redis", result.redis_server)
    return table
