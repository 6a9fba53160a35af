"""An engine with the demo model, and what tests ask of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from qaq.v1 import common_pb2, worker_pb2
from transformers import DynamicCache

from qaq_core import InProcessOriginals, Originals
from qaq_core.models import LoadedModel
from services.common.settings import WorkerSettings
from services.worker.generation import Generation
from services.worker.scheduler.scheduler import Scheduler
from services.worker.state import WorkerState


@dataclass
class Outcome:
    """What came of a generation."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    progress: list[tuple[int, int]] = field(default_factory=list)
    done: common_pb2.Finished | None = None
    pages: list[bytes] = field(default_factory=list)


async def outcome(generation: Generation, sent: list[common_pb2.Token] | None = None) -> Outcome:
    """Reads a generation to its end. Raises the error it ends with.

    Args:
        sent: list to which every token's message is appended.
    """
    result = Outcome()
    while result.done is None:
        reply = await generation.replies.get()
        if isinstance(reply, Exception):
            raise reply
        match reply.WhichOneof("event"):
            case "prefill":
                result.progress.append((reply.prefill.tokens_done, reply.prefill.tokens_total))
            case "token":
                result.tokens.append(reply.token.token_id)
                result.text += reply.token.text
                if sent is not None:
                    sent.append(reply.token)
            case "pages":
                result.pages[reply.pages.first :] = reply.pages.ids
            case "finished":
                result.done = reply.finished
                result.text += reply.finished.text
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
STORY = "The lighthouse keeper climbed the stairs every evening, lit the lamp and wrote the weather in his book. "
LISTS = "A list is a mutable sequence. Methods that change a list return None; sorted() returns a new list. "

Ids = Callable[[str], list[int]]

MakeScheduler = Callable[..., Any]


@pytest.fixture(scope="session")
def smollm2(shallow_smollm2: LoadedModel) -> LoadedModel:
    """In this folder the demo model's first layers; `whole_smollm2` is the whole model."""
    return shallow_smollm2


@pytest.fixture
def make_scheduler(smollm2: LoadedModel) -> MakeScheduler:
    """`async with make_scheduler(prefill_chunk=16, …) as scheduler`."""

    @asynccontextmanager
    async def make(
        originals: Originals | None = None, loaded: LoadedModel = smollm2, **settings: Any
    ) -> AsyncIterator[Scheduler]:
        chosen = WorkerSettings(model="smollm2", **settings)
        scheduler = Scheduler(loaded, originals or InProcessOriginals(), chosen, asyncio.get_running_loop())
        scheduler.start()
        try:
            yield scheduler
        finally:
            await asyncio.to_thread(scheduler.stop)

    return make


def expected(smollm2: LoadedModel, tokens: list[int], new: int) -> list[int]:
    """What transformers makes of it with its own cache."""
    prompt = torch.tensor([tokens])
    with torch.no_grad():
        out = smollm2.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=DynamicCache(),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
    return out[0, len(tokens) :].tolist()


async def settled(scheduler: Scheduler, **wanted: int) -> WorkerState:
    """The engine's state, once it is as wanted."""
    await until(lambda: all(getattr(scheduler.state, name) == value for name, value in wanted.items()))
    return scheduler.state


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
def ids(smollm2: LoadedModel) -> Ids:
    return lambda text: smollm2.tokenizer.encode(text)
