"""`qaq bench elastic`: many sessions with a memory budget that changes while they stream."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import Device, Dtype, JsonPath, Model, model_or_default
from services.cli.terminal import progress_line, screen, size

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from services.worker.generation import Generation
    from services.worker.scheduler.scheduler import Scheduler

SESSIONS_AT_16_BITS = 4
"""The budget is the bytes of this many sessions at 16 bits per element."""

OWN_TOKENS = 64
"""Tokens of each prompt that differ from the other prompts."""

RECOVERED_SHARE = 0.95
_TIMEOUT_S = 120.0


@dataclass
class ElasticResult:
    """Bits per element include scales and tags. Seconds are counted from the change of the budget.

    Attributes:
        shrink_seconds: until the caches hold at most half of the budget; None if they never do.
        longest_gap_seconds: the longest time between two tokens of a stream while the caches shrink.
        streams_stopped: streams without a token in that time.
        recover_seconds: until 95% of the bits are back after the budget is lifted.
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
    context: Annotated[int, typer.Option(min=256, help="Tokens of each prompt; all but 64 are shared.")] = 2048,
    sessions: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 28,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of streaming before the budget changes.")] = 10.0,
    min_bits: Annotated[float, typer.Option(help="Bits per element that the caches keep, see QAQ_KV_MIN_BITS.")] = 0.5,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_path: JsonPath = None,
) -> None:
    """Streams many sessions within the budget of 4 sessions at 16 bits, halves the budget, and lifts it."""
    from qaq_core.models import load_model

    with progress_line() as report:
        loaded = load_model(model_or_default(model), device, dtype, lambda stage, share: report(stage, None), "auto")
        result = asyncio.run(_run(loaded, context, sessions, seconds, min_bits, lambda stage: report(stage, None)))
    screen.print(
        f"{result.sessions} sessions of {result.context} tokens in {size(result.kv_bytes)} "
        f"({size(result.kv_bytes_fp16)} at 16 bits), {result.bits:.2f} bits, "
        f"{result.tokens_per_second:.1f} tokens/s\n"
        f"half the budget: after {_seconds(result.shrink_seconds)}, {result.bits_squeezed:.2f} bits, longest gap "
        f"between tokens {result.longest_gap_seconds:.2f} s, {result.streams_stopped} streams stopped\n"
        f"no budget: {RECOVERED_SHARE:.0%} of the bits after {_seconds(result.recover_seconds)}",
        highlight=False,
    )
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(result), indent=1) + "\n")


async def _run(
    loaded: LoadedModel,
    context: int,
    sessions: int,
    seconds: float,
    min_bits: float,
    report: Callable[[str], None],
) -> ElasticResult:
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
    budget = SESSIONS_AT_16_BITS * context * token
    settings = WorkerSettings(
        model=loaded.name,
        max_sequences=sessions,
        max_waiting=sessions,
        kv_budget_bytes=budget,
        kv_min_bits=min_bits,
        recovery_bytes_per_s=64 << 20,
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
        report("shrinking to the budget")
        await _until(lambda: scheduler.state.kv_bytes <= budget)
        report("streaming")
        start, before = time.monotonic(), sum(len(stream.times) for stream in streams)
        await asyncio.sleep(seconds)
        rate = (sum(len(stream.times) for stream in streams) - before) / (time.monotonic() - start)
        result = ElasticResult(
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
        result.shrink_seconds = await _until(lambda: scheduler.state.kv_bytes <= budget // 2)
        await asyncio.sleep(2.0)
        gaps = [stream.gap_since(began) for stream in streams]
        result.longest_gap_seconds, result.bits_squeezed = max(gaps), scheduler.state.bits
        result.streams_stopped = sum(stream.times[-1] < began for stream in streams)
        report("no budget")
        scheduler.set_budget(None)
        # The bits may exceed those before: the first budget had taken some already.
        result.recover_seconds = await _until(lambda: scheduler.state.bits >= RECOVERED_SHARE * result.bits)
        result.bits_recovered = scheduler.state.bits
        for stream in streams:
            stream.stop()
    finally:
        await asyncio.to_thread(scheduler.stop)
    return result


class _Stream:
    """One endless generation and the times of its tokens."""

    def __init__(self, scheduler: Scheduler, prompt: list[int], new: int) -> None:
        from qaq.v1 import common_pb2, worker_pb2

        stop = common_pb2.StopParams(max_new_tokens=new, ignore_eos=True)
        request = worker_pb2.RunRequest(token_ids=prompt, stop=stop, sampling=common_pb2.SamplingParams(temperature=0))
        self.times: list[float] = []
        self._scheduler = scheduler
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
        """The longest time between two tokens since `moment`, the gap that it falls into included."""
        last = max((t for t in self.times if t < moment), default=moment)
        times = [last, *(t for t in self.times if t >= moment), time.monotonic()]
        return max(after - before for before, after in itertools.pairwise(times))

    def stop(self) -> None:
        self._task.cancel()
        self._scheduler.cancel(self._generation.call)


async def _until(holds: Callable[[], bool]) -> float | None:
    """Seconds until the condition holds; None after `_TIMEOUT_S`."""
    start = time.monotonic()
    while not holds():
        if time.monotonic() - start > _TIMEOUT_S:
            return None
        await asyncio.sleep(0.02)
    return time.monotonic() - start


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s"
