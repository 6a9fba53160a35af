"""`qaq bench prefix`: loading a prompt from the store against computing it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import Device, Dtype, JsonPath, Model, model_or_default
from services.cli.terminal import progress_line, screen

if TYPE_CHECKING:
    from qaq.v1 import common_pb2

    from qaq_core.models import LoadedModel
    from services.worker.scheduler.scheduler import Scheduler


@dataclass
class PrefixSpeed:
    """Median times to the first token over `repeats` alternating runs."""

    model: str
    context: int
    repeats: int
    loaded_tokens: int
    computed_ttft_ms: float
    loaded_ttft_ms: float
    ratio: float


def prefix(
    model: Model = None,
    context: Annotated[int, typer.Option(min=512, help="Tokens of the prompt.")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_path: JsonPath = None,
) -> None:
    """Computes a prompt and loads it, with a cache service and a Redis server in processes of their own."""
    from qaq_core.models import load_model
    from services.common.embedded_redis import EmbeddedRedis

    with progress_line() as report, EmbeddedRedis() as redis, _cache_service(redis.url):
        loaded = load_model(model_or_default(model), device, dtype, lambda stage, share: report(stage, None), "auto")
        result = asyncio.run(_run(loaded, redis.url, context, repeats, lambda stage: report(stage, None)))
    screen.print(
        f"{result.context} tokens: first token after {result.computed_ttft_ms / 1e3:.2f} s computed, "
        f"{result.loaded_ttft_ms / 1e3:.2f} s with {result.loaded_tokens} of them loaded: {result.ratio:.1f} times "
        "faster",
        highlight=False,
    )
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(result), indent=1) + "\n")


async def _run(
    loaded: LoadedModel, redis_url: str, context: int, repeats: int, report: Callable[[str], None]
) -> PrefixSpeed:
    from statistics import median

    from qaq_core.base.errors import ConfigError
    from qaq_eval.quality import builtin_text
    from services.common.settings import WorkerSettings
    from services.originals.client import RemoteOriginals
    from services.worker.scheduler.scheduler import Scheduler

    ids = loaded.tokenizer.encode(builtin_text())
    if len(ids) < context + repeats:
        raise ConfigError(f"the built-in text has {len(ids)} tokens; ask for a shorter context")
    settings = WorkerSettings(model=loaded.name)
    originals = RemoteOriginals.registered(
        redis_url, secret=settings.secret.get_secret_value(), identity=loaded.identity
    )
    scheduler = Scheduler(loaded, originals, settings, asyncio.get_running_loop())
    scheduler.start()
    computed, fetched = [], []
    try:
        await _first_token(scheduler, ids[:64])  # warm-up
        for turn in range(repeats):
            prompt = ids[turn : turn + context]  # begins with another token, so none of its pages is stored
            report(f"computing {turn + 1} of {repeats}")
            computed.append(await _first_token(scheduler, prompt))
            while originals.pending_bytes:  # noqa: ASYNC110 (a thread sets no asyncio.Event)
                await asyncio.sleep(0.05)
            report(f"loading {turn + 1} of {repeats}")
            fetched.append(await _first_token(scheduler, prompt))
    finally:
        await asyncio.to_thread(scheduler.stop)
        await asyncio.to_thread(originals.close)
    times = [median(usage.ttft_ms for usage in usages) for usages in (computed, fetched)]
    return PrefixSpeed(
        model=loaded.name,
        context=context,
        repeats=repeats,
        loaded_tokens=fetched[-1].loaded_tokens,
        computed_ttft_ms=times[0],
        loaded_ttft_ms=times[1],
        ratio=times[0] / times[1],
    )


async def _first_token(scheduler: Scheduler, prompt: list[int]) -> common_pb2.Usage:
    """Runs a prompt to its first token and returns the usage."""
    from qaq.v1 import common_pb2, worker_pb2

    stop = common_pb2.StopParams(max_new_tokens=1, ignore_eos=True)
    generation = scheduler.submit(worker_pb2.RunRequest(token_ids=prompt, stop=stop))
    while True:
        reply = await generation.replies.get()
        if isinstance(reply, Exception):
            raise reply
        if reply.HasField("finished"):
            return reply.finished.usage


@contextlib.contextmanager
def _cache_service(redis_url: str) -> Iterator[None]:
    from services.cluster.stack import python_path

    environment = os.environ | {"PYTHONPATH": python_path(), "QAQ_REDIS_URL": redis_url}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "originals", "--port", "0", "--log-level", "error"],
        stdin=subprocess.DEVNULL,
        env=environment,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)
