"""The engine over a model whose weights are packed and whose layers are compiled."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
import torch

from qaq_core import InProcessOriginals
from qaq_core.models import LoadedModel, load_model
from qaq_core.models.compiled import compile_layers
from services.common.settings import WorkerSettings
from services.worker.scheduler.scheduler import Scheduler
from tests.services.worker.conftest import EXACT, MakeScheduler, outcome, request

STORY = "The lighthouse keeper climbed the stairs every evening, lit the lamp and wrote the weather in his book. "

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"),
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN"),
]


async def test_it_says_the_same(smollm2: LoadedModel, model_path: Path, make_scheduler: MakeScheduler) -> None:
    prompts = [smollm2.tokenizer(STORY * n).input_ids for n in (6, 5, 4)]
    async with make_scheduler() as scheduler:
        want = [await outcome(scheduler.submit(request(tokens, 8, cache=EXACT))) for tokens in prompts]
    settings = WorkerSettings(model=str(model_path), weights="float32", compiled=True)
    loaded = load_model(settings.model, weights=settings.weights)
    compile_layers(loaded.model)
    scheduler = Scheduler(loaded, InProcessOriginals(), settings, asyncio.get_running_loop())
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
