"""The scheduler with the real model: what it computes, what it counts, and how it stops."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import REGISTRY
from qaq.v1 import common_pb2

from qaq_core import QuantizationError, SequenceCache
from qaq_core.base.widths import WIDTHS
from qaq_core.models import LoadedModel
from services.common.errors import Unavailable
from services.worker.scheduler.scheduler import Scheduler
from services.worker.state import WorkerState
from tests.services.worker.conftest import (
    EXACT,
    LISTS,
    STORY,
    Gate,
    Ids,
    MakeScheduler,
    expected,
    outcome,
    request,
)


async def test_same_tokens_as_transformers(smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY * 6)
    async with make_scheduler(prefill_chunk=50) as scheduler:
        result = await outcome(scheduler.submit(request(tokens, 12, cache=EXACT)))
    assert result.tokens == expected(smollm2, tokens, 12)
    assert result.text == smollm2.tokenizer.decode(result.tokens)
    assert result.progress == [(min(at + 50, len(tokens)), len(tokens)) for at in range(0, len(tokens), 50)]
    assert result.done is not None
    usage = result.done.usage
    assert (usage.prompt_tokens, usage.generated_tokens) == (len(tokens), 12)
    assert result.done.reason == common_pb2.FINISH_REASON_LENGTH
    assert usage.cache.tokens == len(tokens) + 11
    assert usage.ttft_ms > 0
    assert usage.decode_ms > 0


async def test_default_preset_is_quantized(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler() as scheduler:
        result = await outcome(scheduler.submit(request(ids(STORY * 12), 4)))
    assert result.done is not None
    cache = result.done.usage.cache
    assert cache.kv_bytes < cache.kv_bytes_fp16 / 2
    assert sum(cache.key_bits_histogram.values()) == sum(cache.value_bits_histogram.values()) > 0
    assert set(cache.key_bits_histogram) | set(cache.value_bits_histogram) <= set(WIDTHS[:-1])  # half bits


async def test_metrics_follow(make_scheduler: MakeScheduler, ids: Ids) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    before = value("qaq_exceptions_total")
    async with make_scheduler() as scheduler:
        result = await outcome(scheduler.submit(request(ids(STORY * 4), 24, session_id="s", keep=True)))
        assert result.done is not None
        cache = result.done.usage.cache
        assert cache.exceptions > 0
        assert value("qaq_exceptions_total") - before == cache.exceptions
        assert value("qaq_kv_bytes", tier="device") == scheduler.state.kv_bytes == cache.kv_bytes
        assert value("qaq_kv_compression_ratio") == pytest.approx(cache.kv_bytes_fp16 / cache.kv_bytes)
        assert value("qaq_sessions") == 1
        assert value("qaq_running") == 0
        running = scheduler.submit(request(ids(STORY), 12))
        assert (await running.replies.get()).WhichOneof("event")
        assert value("qaq_running") == 1
        await outcome(running)
    assert value("qaq_kv_bytes", tier="device") == 0


async def test_seed_repeats_a_generation(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async def run(scheduler: Scheduler, seed: int) -> list[int]:
        sampling = common_pb2.SamplingParams(temperature=1.5, seed=seed)
        return (await outcome(scheduler.submit(request(ids(STORY), 6, sampling=sampling, cache=EXACT)))).tokens

    async with make_scheduler() as scheduler:
        assert await run(scheduler, 1) == await run(scheduler, 1)
        assert await run(scheduler, 1) != await run(scheduler, 2)


@pytest.mark.parametrize("where", ["commit", "_begin_step"])
async def test_a_faulty_sequence_ends_alone(
    smollm2: LoadedModel,
    make_scheduler: MakeScheduler,
    ids: Ids,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    prompts = [ids(LISTS), ids(STORY), ids(STORY + LISTS)]
    limit = len(prompts[1]) + 2
    original = getattr(SequenceCache, where)

    def faulty(self: SequenceCache, *args: Any, **kwargs: Any) -> Any:
        mine = [len(prompts[1]) <= self.length, self.staging.tokens == self.length, self.length == limit]
        if all(mine) and "faulty" in vars(self):
            raise QuantizationError("layer 3: rows hold NaN")
        return original(self, *args, **kwargs)

    made = SequenceCache.__init__

    def marked(self: SequenceCache, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        count.append(self)
        if len(count) == 2:
            self.__dict__["faulty"] = True

    count: list[SequenceCache] = []
    monkeypatch.setattr(SequenceCache, "__init__", marked)
    monkeypatch.setattr(SequenceCache, where, faulty)
    async with make_scheduler() as scheduler:
        generations = [scheduler.submit(request(tokens, 8, cache=EXACT)) for tokens in prompts]
        gate.open()
        results = await asyncio.gather(*map(outcome, generations), return_exceptions=True)
        assert isinstance(results[1], QuantizationError)
        for index in (0, 2):
            result = results[index]
            assert not isinstance(result, BaseException), result
            assert result.tokens == expected(smollm2, prompts[index], 8)
        assert (await outcome(scheduler.submit(request(prompts[1], 2, cache=EXACT)))).tokens


async def test_stopping_ends_everything(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler(max_sequences=1) as scheduler:
        generations = [scheduler.submit(request(ids(STORY), 5000, cache=EXACT)) for _ in range(2)]
        await generations[0].replies.get()
    for generation in generations:
        with pytest.raises(Unavailable, match="again"):
            await outcome(generation)
    with pytest.raises(Unavailable):
        scheduler.submit(request(ids(STORY)))
    assert scheduler.state == WorkerState()
