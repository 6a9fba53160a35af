"""An engine with the demo model, and what tests ask of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from qaq.v1 import common_pb2, worker_pb2

from qaq_core import InProcessOriginals, Originals
from qaq_core.models.loading import LoadedModel
from services.common.settings import WorkerSettings
from services.worker.generation import Generation
from services.worker.scheduler.scheduler import Scheduler


@dataclass
class Outcome:
    """What came of a generation."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    progress: list[tuple[int, int]] = field(default_factory=list)
    done: worker_pb2.RunReply.Done | None = None
    pages: list[bytes] = field(default_factory=list)


async def outcome(generation: Generation) -> Outcome:
    """Reads a generation to its end. Raises the error it ends with."""
    result = Outcome()
    while result.done is None:
        reply = await generation.replies.get()
        if isinstance(reply, Exception):
            raise reply
        match reply.WhichOneof("event"):
            case "progress":
                result.progress.append((reply.progress.tokens_done, reply.progress.tokens_total))
            case "token":
                result.tokens.append(reply.token.token_id)
                result.text += reply.token.text
            case "pages":
                result.pages[reply.pages.first :] = reply.pages.ids
            case "done":
                result.done = reply.done
                result.text += reply.done.text
    return result


async def until(holds: Callable[[], bool]) -> None:
    """Waits for something of the engine's thread; the test's own timeout ends a wait in vain."""
    while not holds():  # noqa: ASYNC110 (a thread sets no asyncio.Event)
        await asyncio.sleep(0.01)


def request(tokens: list[int], new: int = 8, **fields: Any) -> worker_pb2.RunRequest:
    """A greedy request that does not end early."""
    stop = fields.pop("stop", None) or common_pb2.StopParams(max_new_tokens=new, ignore_eos=True)
    sampling = fields.pop("sampling", None) or common_pb2.SamplingParams(temperature=0)
    return worker_pb2.RunRequest(token_ids=tokens, stop=stop, sampling=sampling, **fields)


EXACT = common_pb2.CacheParams(preset="fp16")


MakeScheduler = Callable[..., Any]


@pytest.fixture
def make_scheduler(smollm2: LoadedModel) -> MakeScheduler:
    """`async with make_scheduler(prefill_chunk=16, …) as scheduler`."""

    @asynccontextmanager
    async def make(originals: Originals | None = None, **settings: Any) -> AsyncIterator[Scheduler]:
        chosen = WorkerSettings(model="smollm2", **settings)
        scheduler = Scheduler(smollm2, originals or InProcessOriginals(), chosen, asyncio.get_running_loop())
        scheduler.start()
        try:
            yield scheduler
        finally:
            await asyncio.to_thread(scheduler.stop)

    return make


class Gate:
    """Holds up every forward pass of a model until it is opened, so that a test knows what runs together."""

    def __init__(self, model: Any) -> None:
        self._open = threading.Event()
        self.batches: list[tuple[int, int]] = []
        self._handle = model.register_forward_pre_hook(self._hold, with_kwargs=True)

    def _hold(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.batches.append(tuple(kwargs["input_ids"].shape))
        assert self._open.wait(60)

    def open(self) -> None:
        self._open.set()

    def shut(self) -> None:
        self._open.clear()

    def remove(self) -> None:
        self.open()
        self._handle.remove()


@pytest.fixture
def gate(smollm2: LoadedModel) -> Any:
    made = Gate(smollm2.model)
    yield made
    made.remove()


@pytest.fixture
def ids(smollm2: LoadedModel) -> Callable[[str], list[int]]:
    return lambda text: smollm2.tokenizer.encode(text)
