"""The request queue: its bound, cancelled requests, and requests that are refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from qaq.v1 import common_pb2

from services.common.errors import InvalidArgument, ResourceExhausted
from tests.services.worker.conftest import (
    EXACT,
    STORY,
    Gate,
    Ids,
    MakeScheduler,
    outcome,
    request,
    settled,
    until,
)


async def test_queue_is_bounded(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    async with make_scheduler(max_sequences=1, max_waiting=2) as scheduler:
        generations = [scheduler.submit(request(ids(STORY), 3, cache=EXACT))]
        await until(lambda: bool(gate.batches))  # the first runs
        generations += [scheduler.submit(request(ids(STORY), 3, cache=EXACT)) for _ in range(2)]
        with pytest.raises(ResourceExhausted, match="2 generations wait already") as refused:
            scheduler.submit(request(ids(STORY), 3, cache=EXACT))
        assert refused.value.retry_after_ms
        gate.open()
        results = await asyncio.gather(*map(outcome, generations))
        assert len({tuple(result.tokens) for result in results}) == 1
        assert max(batch for batch, _ in gate.batches) == 1
        assert (await outcome(scheduler.submit(request(ids(STORY), 3, cache=EXACT)))).tokens == results[0].tokens


async def test_cancelling_frees_within_a_step(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler(max_sequences=1) as scheduler:
        running = scheduler.submit(request(ids(STORY), 5000, cache=EXACT))
        while (await running.replies.get()).WhichOneof("event") != "token":
            pass
        waiting = scheduler.submit(request(ids(STORY), 5000, cache=EXACT))
        scheduler.cancel(waiting.call)
        scheduler.cancel(running.call)
        state = await settled(scheduler, running=0, waiting=0)
        assert (state.sessions, state.kv_bytes) == (0, 0)
        assert (await outcome(scheduler.submit(request(ids(STORY), 3, cache=EXACT)))).tokens


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tokens": []}, "token_ids is empty"),
        ({"tokens": [1, -1]}, "vocabulary"),
        ({"tokens": [49152]}, "vocabulary"),
        ({"tokens": [1] * 8192}, "context of 8192"),
        ({"tokens": [1], "new": 0}, "max_new_tokens"),
        ({"tokens": [1], "sampling": common_pb2.SamplingParams(temperature=-1)}, "temperature"),
        ({"tokens": [1], "stop": common_pb2.StopParams(max_new_tokens=1, stop=[""])}, "is empty"),
    ],
)
async def test_bad_requests(make_scheduler: MakeScheduler, fields: dict[str, Any], sentence: str) -> None:
    async with make_scheduler() as scheduler:
        with pytest.raises(InvalidArgument, match=sentence):
            scheduler.submit(request(fields.pop("tokens"), fields.pop("new", 1), **fields))


@pytest.mark.parametrize(
    "cache", [{"preset": "zip"}, {"target_bits": 99}, {"target_compression": 0.5}, {"target_error": 11}]
)
async def test_bad_cache_parameters_end_that_request(
    make_scheduler: MakeScheduler, ids: Ids, cache: dict[str, Any]
) -> None:
    async with make_scheduler() as scheduler:
        with pytest.raises(InvalidArgument, match=r"cache\.(preset|target)"):
            await outcome(scheduler.submit(request(ids(STORY), cache=common_pb2.CacheParams(**cache))))
        assert (await outcome(scheduler.submit(request(ids(STORY), 1, cache=EXACT)))).tokens
