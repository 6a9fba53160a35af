"""`qaq bench lookup`: decoding with prompt lookup against decoding one by one, when a text is edited."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import Device, Dtype, JsonPath, Model, Weights, model_or_default
from services.cli.terminal import progress_line, screen

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from services.worker.scheduler.scheduler import Scheduler

TASK = "Write this text again, word by word, but replace every 'the' by 'THE':\n\n{}"


@dataclass
class LookupSpeed:
    """Medians over `repeats` alternating runs of one greedy generation.

    Attributes:
        plain_runs, lookup_runs: tokens a second of each run.
        drafted, accepted: tokens that one run drafted, and those of them that were right.
        equal: both ways gave the same tokens in every run.
    """

    model: str
    preset: str
    speculative_tokens: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    drafted: int
    accepted: int
    plain_tokens_per_second: float
    lookup_tokens_per_second: float
    ratio: float
    plain_runs: list[float]
    lookup_runs: list[float]
    equal: bool


def lookup(
    model: Model = None,
    words: Annotated[int, typer.Option(min=10, help="Words of the text that is edited.")] = 300,
    new: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 256,
    speculative_tokens: Annotated[int, typer.Option(min=1, help="Tokens drafted at a time.")] = 7,
    preset: Annotated[str, typer.Option(help="Preset of the cache.")] = "balanced",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    json_path: JsonPath = None,
) -> None:
    """Edits a text on a worker that drafts by prompt lookup and on one that does not, in turn."""
    from qaq_core.models import load_model

    with progress_line() as report:
        loaded = load_model(model_or_default(model), device, dtype, lambda stage, share: report(stage, None), weights)
        prompt = _prompt(loaded, words)
        result = asyncio.run(
            _run(loaded, prompt, new, speculative_tokens, preset, repeats, lambda stage: report(stage, None))
        )
    screen.print(
        f"{result.new_tokens} tokens behind {result.prompt_tokens}: {result.plain_tokens_per_second:.1f} tokens/s one "
        f"by one, {result.lookup_tokens_per_second:.1f} with prompt lookup, {result.ratio:.2f} times as many; "
        f"{result.accepted} of {result.drafted} drafted tokens accepted; "
        f"the tokens are {'equal' if result.equal else 'NOT equal'}",
        highlight=False,
    )
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(result), indent=1) + "\n")


def _prompt(loaded: LoadedModel, words: int) -> list[int]:
    from qaq_eval.quality import builtin_text

    task = TASK.format(" ".join(builtin_text().split()[:words]))
    if loaded.tokenizer.chat_template is None:
        return list(loaded.tokenizer.encode(task + "\n\n"))
    message = [{"role": "user", "content": task}]
    return list(loaded.tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"])


async def _run(
    loaded: LoadedModel,
    prompt: list[int],
    new: int,
    speculative_tokens: int,
    preset: str,
    repeats: int,
    report: Callable[[str], None],
) -> LookupSpeed:
    from statistics import median

    from qaq_core import InProcessOriginals
    from services.common.settings import WorkerSettings
    from services.worker.scheduler.scheduler import Scheduler

    def scheduler(tokens: int) -> Scheduler:
        settings = WorkerSettings(
            model=loaded.name, preset=preset, prefix_reuse=False, requantize_wait=True, speculative_tokens=tokens
        )
        return Scheduler(loaded, InProcessOriginals(), settings, asyncio.get_running_loop())

    ways = {"one by one": scheduler(0), "prompt lookup": scheduler(speculative_tokens)}
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    answers = []
    for way in ways.values():
        way.start()
    try:
        for way in ways.values():
            await _generate(way, prompt, 16)  # warm-up
        before = _counted()
        for turn in range(repeats):
            for name, way in ways.items():
                report(f"{name} {turn + 1} of {repeats}")
                tokens, speed = await _generate(way, prompt, new)
                answers.append(tokens)
                speeds[name].append(speed)
    finally:
        for way in ways.values():
            await asyncio.to_thread(way.stop)
    drafted, accepted = (int(now - then) // repeats for now, then in zip(_counted(), before, strict=True))
    plain, looked_up = (median(speed) for speed in speeds.values())
    return LookupSpeed(
        model=loaded.name,
        preset=preset,
        speculative_tokens=speculative_tokens,
        prompt_tokens=len(prompt),
        new_tokens=new,
        repeats=repeats,
        drafted=drafted,
        accepted=accepted,
        plain_tokens_per_second=plain,
        lookup_tokens_per_second=looked_up,
        ratio=looked_up / plain,
        plain_runs=speeds["one by one"],
        lookup_runs=speeds["prompt lookup"],
        equal=all(answer == answers[0] for answer in answers),
    )


def _counted() -> list[float]:
    """Tokens that this process has drafted, and those of them that were accepted."""
    from prometheus_client import REGISTRY

    names = ("qaq_drafted_tokens_total", "qaq_accepted_tokens_total")
    return [REGISTRY.get_sample_value(name) or 0.0 for name in names]


async def _generate(scheduler: Scheduler, prompt: list[int], new: int) -> tuple[list[int], float]:
    """The tokens of a greedy generation, and how many a second came after the first."""
    from qaq.v1 import common_pb2, worker_pb2

    stop = common_pb2.StopParams(max_new_tokens=new, ignore_eos=True)
    sampling = common_pb2.SamplingParams(temperature=0)
    generation = scheduler.submit(worker_pb2.RunRequest(token_ids=prompt, stop=stop, sampling=sampling))
    tokens: list[int] = []
    while True:
        reply = await generation.replies.get()
        if isinstance(reply, Exception):
            raise reply
        if reply.HasField("token"):
            tokens.append(reply.token.token_id)
        elif reply.HasField("finished"):
            return tokens, (len(tokens) - 1) / (reply.finished.usage.decode_ms / 1e3)
