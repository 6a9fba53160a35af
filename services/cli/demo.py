"""`qaq demo`: starts a stack, answers a question about a long text, and shows what the cache did."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from services.cli.demo_result import DemoResult, FullPrecision
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
from services.cli.terminal import progress_line, screen, starting, warn_of_environment

if TYPE_CHECKING:
    from services.cli.streaming import Generation
    from services.cluster.state import StackSettings, StackState
    from services.common.streams import Asked

# Chapters of the reference that is a part of Python. The answer is in the first one, far from the question.
CHAPTERS = ("with", "assert", "for", "while", "break", "continue")
QUESTION = 'According to the text above, what is the "with" statement used for? Explain it in a few sentences.'
REPETITION_PENALTY = 1.1


class Measured(NamedTuple):
    """The figures of an answer, and the token ids of prompt and answer."""

    result: DemoResult
    prompt: list[int]
    answer: list[int]


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    model: Model = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Use the prompt in this file instead of the built-in question.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Maximum number of tokens to generate.")] = 160,
    compare: Annotated[
        bool, typer.Option(help="Answer the question from a full-precision cache too, after the stack has stopped.")
    ] = True,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    compiled: Compiled = False,
    preset: StackPreset = "balanced",
    target_bits: StackTargetBits = None,
    json_path: JsonPath = None,
) -> None:
    """Starts a stack, answers a question about a long text, shows the figures, stops everything, and then compares the
    answer with that of a full-precision cache."""
    prompt = prompt_file.read_text() if prompt_file else long_prompt()
    with contextlib.ExitStack() as stack:
        with starting() as report:
            report("stack", "reading the settings", None)  # the imports take seconds on a slow machine
            from services.cli import demo_page
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
        result, prompt_ids, answer_ids = measure(running, prompt, max_new_tokens)
        screen.print(demo_page.cache_figures(result, screen), highlight=False)
    _write(result, json_path)  # what is measured stays if the comparison is interrupted
    if compare and answer_ids:
        screen.print()
        result.full_precision = _compared(settings, prompt_ids, answer_ids, max_new_tokens)
        screen.print(demo_page.comparison(result, result.full_precision, screen), highlight=False)
        _write(result, json_path)
    screen.print()
    screen.print(demo_page.next_steps(_command()), highlight=False, soft_wrap=True)


def _write(result: DemoResult, path: Path | None) -> None:
    if path is not None:
        path.write_text(result.model_dump_json(indent=1) + "\n")


def _compared(
    settings: StackSettings, prompt: Sequence[int], answer: Sequence[int], max_new_tokens: int
) -> FullPrecision:
    """The answer beside that of full precision, computed in this process from the model that was served."""
    with progress_line() as report:
        report("loading the model", None)
        from qaq.v1 import common_pb2

        from qaq_core.models import load_model
        from services.cli.full_precision import Answered, full_precision
        from services.cluster import roles
        from services.worker.methods import Methods

        loaded = load_model(settings.model, settings.device, settings.dtype, report, settings.weights)
        worker = roles.worker(settings, {"redis_url": "redis://127.0.0.1"})  # where nobody is asked
        method = Methods(loaded, worker).get(common_pb2.CacheParams())
        while answer[-1] in loaded.eos_token_ids and len(answer) > 1:
            answer = answer[:-1]
        return full_precision(loaded, method, Answered(prompt, answer, REPETITION_PENALTY, max_new_tokens), report)


def _command() -> str:
    """How this program was called, for what to call next."""
    name = Path(sys.argv[0])
    return str(name) if name.name == "qaq" and not name.is_absolute() else "qaq"


def long_prompt() -> str:
    """English text of about 1,800 tokens, and a question about its beginning."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[chapter].strip() for chapter in CHAPTERS) + f"\n\n{QUESTION}"


def measure(running: StackState, prompt: str, max_new_tokens: int) -> Measured:
    """Sends a prompt to a running stack, shows the answer as it arrives, and collects the figures."""
    from qaq.v1 import generate_pb2

    from services.cli.inference import inference
    from services.cli.streaming import follow
    from services.cluster.status import stack_status

    with inference(running.router, running.access.identity("operator"), running.key("client")) as client:
        model = client.once(lambda stub: stub.GetModel(generate_pb2.GetModelRequest(), timeout=30)).model
        sampling = {"temperature": 0.0, "repetition_penalty": REPETITION_PENALTY}
        stop = {"max_new_tokens": max_new_tokens}
        asked: Asked = generate_pb2.GenerateRequest(prompt=prompt, sampling=sampling, stop=stop)
        tokenize = generate_pb2.TokenizeRequest(text=prompt)
        if model.has_chat_template:
            messages = [{"role": "user", "content": prompt}]
            asked = generate_pb2.ChatRequest(messages=messages, sampling=sampling, stop=stop)
            tokenize = generate_pb2.TokenizeRequest(messages=messages)
        with contextlib.closing(client.stream(asked)) as replies:
            generation = follow(replies)
        prompt_ids = client.once(lambda stub: stub.Tokenize(tokenize, timeout=30)).token_ids
    stores = asyncio.run(stack_status(running.access)).originals
    # All cache services use the same Redis.
    stored = max((store.bytes for store in stores.values() if store is not None), default=0)
    result = _result(generation, stored, running.redis["description"])
    return Measured(result, list(prompt_ids), generation.token_ids)


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
        prompt_tokens=generation.usage.prompt_tokens,
        full_precision=None,
    )


def _histogram(counts: object) -> dict[str, int]:
    return {f"{width / 2:g}": count for width, count in sorted(dict(counts).items())}  # type: ignore[call-overload]
