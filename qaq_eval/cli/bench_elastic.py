"""`qaq bench elastic`: many sessions under a budget that changes while they stream."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.stack import Device, Dtype, JsonPath, Model, model_or_default
from services.cli.terminal import progress_line, screen, size

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from services.worker.generation import Generation
    from services.worker.scheduler.scheduler import Scheduler

FULL = 4
"""The budget is what so many sessions take at 16 bits an element."""

OWN_TOKENS = 64
ENOUGH = 0.95
_PATIENCE_S = 120.0


@dataclass
class Elastic:
    """What was measured. Bits an element with scales and tags; seconds from the change of the budget on.

    Attributes:
        shrink_seconds: until the caches hold at most half the budget; None if they never did.
        longest_gap_seconds: between two tokens of a stream while it shrank.
        streams_stopped: that had no token then.
        recover_seconds: until 95% of the bits are back, when the budget is lifted.
    """

    model: str
    context: int
    sessions: int
    budget_bytes: int
    kv_bytes: int
    kv_bytes_fp16: int
    bits: float
    tokens_per_second: float
    shrink_seconds: float | None = None
    longest_gap_seconds: float = 0.0
    streams_stopped: int = 0
    bits_squeezed: float = 0.0
    recover_seconds: float | None = None
    bits_recovered: float = 0.0


def elastic(
    model: Model = None,
    context: Annotated[int, typer.Option(min=256, help="Tokens of each prompt; all but 64 are the same.")] = 2048,
    sessions: Annotated[int, typer.Option(min=1, help="How many stream at once.")] = 28,
    seconds: Annotated[float, typer.Option(min=1, help="How long to stream before the budget changes.")] = 10.0,
    floor_bits: Annotated[float, typer.Option(help="As QAQ_KV_FLOOR_BITS.")] = 0.5,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_path: JsonPath = None,
) -> None:
    """Streams many sessions within the budget of 4 at full precision, halves it, and lifts it again."""
    from qaq_core.models import load_model

    with progress_line() as report:
        loaded = load_model(model_or_default(model), device, dtype, lambda what, share: report(what, None), "auto")
        found = asyncio.run(_run(loaded, context, sessions, seconds, floor_bits, lambda what: report(what, None)))
    screen.print(
        f"{found.sessions} sessions of {found.context} tokens in {size(found.kv_bytes)} "
        f"({size(found.kv_bytes_fp16)} at 16 bits), {found.bits:.2f} bits, "
        f"{found.tokens_per_second:.1f} tokens/s\n"
        f"half the budget: after {_told(found.shrink_seconds)}, {found.bits_squeezed:.2f} bits, longest gap "
        f"between tokens {found.longest_gap_seconds:.2f} s, {found.streams_stopped} streams stopped\n"
        f"no budget: {ENOUGH:.0%} of the bits after {_told(found.recover_seconds)}",
        highlight=False,
    )
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(found), indent=1) + "\n")


async def _run(
    loaded: LoadedModel,
    context: int,
    sessions: int,
    seconds: float,
    floor_bits: float,
    report: Callable[[str], None],
) -> Elastic:
    from qaq_core import InProcessOriginals
    from qaq_core.base.errors import ConfigError
    from qaq_core.models import ModelShape
    from qaq_eval.quality import builtin_text
    from services.common.settings import WorkerSettings
    from services.worker.scheduler.scheduler import Scheduler

    ids = loaded.tokenizer.encode(builtin_text())
    if len(ids) < context + OWN_TOKENS * 2:
        raise ConfigError(f"the built-in text has {len(ids)} tokens; ask for a shorter context")
    shape = ModelShape.of(loaded.model)
    token = shape.layers * 2 * shape.kv_heads * shape.head_dim * 2
    budget = FULL * context * token
    settings = WorkerSettings(
        model=loaded.name,
        max_sequences=sessions,
        max_waiting=sessions,
        kv_budget_bytes=budget,
        kv_floor_bits=floor_bits,
        widen_bytes_per_s=64 << 20,
    )
    scheduler = Scheduler(loaded, InProcessOriginals(), settings, asyncio.get_running_loop())
    scheduler.start()
    try:
        shared = ids[: context - OWN_TOKENS]
        room = len(ids) - OWN_TOKENS
        prompts = [shared + ids[room * i // sessions : room * i // sessions + OWN_TOKENS] for i in range(sessions)]
        streams = [_Stream(scheduler, prompt, loaded.context_length - context - 1) for prompt in prompts]
        while any(not stream.times for stream in streams):
            report(f"prompts: {sum(bool(stream.times) for stream in streams)} of {sessions}")
            await asyncio.sleep(0.2)
        report("coming within the budget")
        await _until(lambda: scheduler.state.kv_bytes <= budget)
        report("streaming")
        start, before = time.monotonic(), sum(len(stream.times) for stream in streams)
        await asyncio.sleep(seconds)
        rate = (sum(len(stream.times) for stream in streams) - before) / (time.monotonic() - start)
        figures = Elastic(
            model=loaded.name,
            context=context,
            sessions=sessions,
            budget_bytes=budget,
            kv_bytes=scheduler.state.kv_bytes,
            kv_bytes_fp16=sum(context + len(stream.times) for stream in streams) * token,
            bits=scheduler.state.bits,
            tokens_per_second=rate,
        )
        report("half the budget")
        began = time.monotonic()
        scheduler.set_budget(budget // 2)
        figures.shrink_seconds = await _until(lambda: scheduler.state.kv_bytes <= budget // 2)
        await asyncio.sleep(2.0)
        gaps = [stream.gap_since(began) for stream in streams]
        figures.longest_gap_seconds, figures.bits_squeezed = max(gaps), scheduler.state.bits
        figures.streams_stopped = sum(stream.times[-1] < began for stream in streams)
        report("no budget")
        scheduler.set_budget(None)
        # More than there was before: the budget had taken bits already.
        figures.recover_seconds = await _until(lambda: scheduler.state.bits >= ENOUGH * figures.bits)
        figures.bits_recovered = scheduler.state.bits
        for stream in streams:
            stream.stop()
    finally:
        await asyncio.to_thread(scheduler.stop)
    return figures


class _Stream:
    """One endless generation and when its tokens came."""

    def __init__(self, scheduler: Scheduler, prompt: list[int], new: int) -> None:
        from qaq.v1 import common_pb2, worker_pb2

        stop = common_pb2.StopParams(max_new_tokens=new, ignore_eos=True)
        request = worker_pb2.RunRequest(token_ids=prompt, stop=stop, sampling=common_pb2.SamplingParams(temperature=0))
        self.times: list[float] = []
        self._engine = scheduler
        self._generation: Generation = scheduler.submit(request)
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            reply = await self._generation.replies.get()
            if isinstance(reply, Exception):
                raise reply
            if reply.WhichOneof("event") == "token":
                self.times.append(time.monotonic())

    def gap_since(self, moment: float) -> float:
        """The longest time without a token since then, the one before it included."""
        last = max((t for t in self.times if t < moment), default=moment)
        times = [last, *(t for t in self.times if t >= moment), time.monotonic()]
        return max(after - before for before, after in itertools.pairwise(times))

    def stop(self) -> None:
        self._task.cancel()
        self._engine.cancel(self._generation)


async def _until(holds: Callable[[], bool]) -> float | None:
    """Seconds until something holds; None if it does not in time."""
    start = time.monotonic()
    while not holds():
        if time.monotonic() - start > _PATIENCE_S:
            return None
        await asyncio.sleep(0.02)
    return time.monotonic() - start


def _told(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s"
