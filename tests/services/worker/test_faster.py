"""The engine over a model whose weights are packed and whose layers are compiled."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from qaq_core import InProcessOriginals
from qaq_core.models import LoadedModel
from qaq_core.models.compiled import compile_layers
from qaq_core.models.linear import pack
from services.common.settings import WorkerSettings
from services.worker.scheduler.scheduler import Scheduler
from tests.services.worker.conftest import EXACT, MakeScheduler, outcome, request
from tests.shallow import shallow

STORY = "The lighthouse keeper climbed the stairs every evening, lit the lamp and wrote the weather in his book. "

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"),
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN"),
]


@pytest.fixture
def faster(whole_smollm2: LoadedModel) -> Iterator[LoadedModel]:
    """As `load_model` makes it where weights are packed, and the worker where layers are compiled."""
    with shallow(whole_smollm2) as loaded:
        yield replace(loaded, weights=pack(loaded.model, "float32"))


async def test_it_says_the_same(smollm2: LoadedModel, faster: LoadedModel, make_scheduler: MakeScheduler) -> None:
    prompts = [smollm2.tokenizer(STORY * n).input_ids for n in (6, 5, 4)]
    async with make_scheduler() as scheduler:
        want = [await outcome(scheduler.submit(request(tokens, 8, cache=EXACT))) for tokens in prompts]
    settings = WorkerSettings(model="smollm2", weights="float32", compiled=True)
    compile_layers(faster.model)
    scheduler = Scheduler(faster, InProcessOriginals(), settings, asyncio.get_running_loop())
    scheduler.start()
    try:
        alone = await outcome(scheduler.submit(request(prompts[0], 8, cache=EXACT)))
        running = [scheduler.submit(request(tokens, 8, cache=EXACT)) for tokens in prompts]
        together = [await outcome(generation) for generation in running]
    finally:
        await asyncio.to_thread(scheduler.stop)
    assert [alone.tokens, *(each.tokens for each in together)] == [
        want[0].tokens,
        *(each.tokens for each in want),
    ]
