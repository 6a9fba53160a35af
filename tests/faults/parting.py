"""`python -m tests.faults.parting`: how often tokens part when a stream is resumed on another worker.

Greedy streams run to their end. Then each is resumed from its middle, with the tokens and the page ids that a router
would send, and compared with what came before. As a control each is also run a second time without a break.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

from qaq.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from qaq_core.models import load_tokenizer
from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from tests.faults.processes import Processes

STREAMS = 16
TOGETHER = 8
PROMPT, NEW = 256, 128


@dataclass
class Ran:
    tokens: list[int] = field(default_factory=list)
    pages: list[bytes] = field(default_factory=list)
    pages_at_half: list[bytes] = field(default_factory=list)


async def ran(
    stub: worker_pb2_grpc.WorkerStub, preset: str, tenant: str, tokens: Sequence[int], done: int, pages: Sequence[bytes]
) -> Ran:
    """A stream to its end, from `done` generated tokens on."""
    request = worker_pb2.RunRequest(
        token_ids=tokens,
        generated_tokens=done,
        page_ids=pages,
        tenant=tenant,
        sampling=common_pb2.SamplingParams(temperature=0),
        stop=common_pb2.StopParams(max_new_tokens=NEW, ignore_eos=True),
        cache=common_pb2.CacheParams(preset=preset),
    )
    result = Ran()
    async for reply in stub.Run(request, timeout=600):
        if reply.HasField("pages"):
            result.pages[reply.pages.first :] = reply.pages.ids
        elif reply.HasField("token"):
            result.tokens.append(reply.token.token_id)
            if len(result.tokens) == NEW // 2:
                result.pages_at_half = list(result.pages)
    return result


def parted(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The place of the first token that differs."""
    return next((place for place, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b), None)


def told(name: str, places: Sequence[int | None]) -> str:
    found = [place for place in places if place is not None]
    after = f", the median one after {statistics.median(found):.0f} tokens" if found else ""
    return f"{name}: {len(found)} of {len(places)} part{after}"


async def measure(address: str, prompts: Sequence[Sequence[int]]) -> None:
    async with open_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        for preset in ("fp16", "balanced"):
            resumed: list[int | None] = []
            again: list[int | None] = []
            for first in range(0, len(prompts), TOGETHER):
                asked = prompts[first : first + TOGETHER]
                whole = await asyncio.gather(*(ran(stub, preset, f"{preset} once", prompt, 0, ()) for prompt in asked))
                rest = await asyncio.gather(
                    *(
                        ran(stub, preset, f"{preset} once", [*p, *w.tokens[: NEW // 2]], NEW // 2, w.pages_at_half)
                        for p, w in zip(asked, whole, strict=True)
                    )
                )
                control = await asyncio.gather(
                    *(ran(stub, preset, f"{preset} again", prompt, 0, ()) for prompt in asked)
                )
                resumed += [parted(w.tokens[NEW // 2 :], r.tokens) for w, r in zip(whole, rest, strict=True)]
                again += [parted(w.tokens, c.tokens) for w, c in zip(whole, control, strict=True)]
                print(told(f"{preset}, resumed", resumed), told(f"{preset}, run again", again), sep="\n", flush=True)


def main() -> None:
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qaq-parting-")))
        processes = Processes(stack.enter_context(EmbeddedRedis()), directory)
        stack.callback(processes.stop)
        worker = processes.start("worker", OMP_NUM_THREADS="1")
        processes.until_serving(worker, processes.start("originals"))
        text = "\n\n".join(topics[name] for name in sorted(topics))[:100_000]
        ids = load_tokenizer(processes.model)(text)["input_ids"]
        asyncio.run(measure(worker, [ids[place * PROMPT : (place + 1) * PROMPT] for place in range(STREAMS)]))


if __name__ == "__main__":
    main()
