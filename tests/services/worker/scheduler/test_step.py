"""Steps: which tokens are computed together, and that a batch decides as each sequence alone."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from qaq_core import SequenceCache
from qaq_core.models import Decoder, LoadedModel
from services.common.errors import ResourceExhausted
from services.worker.generation import Generation
from tests.core.decisions import differing
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


async def test_sequences_decode_in_one_pass(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, gate: Gate
) -> None:
    prompts = [ids(STORY), ids(LISTS * 2), ids(STORY + LISTS)]
    async with make_scheduler() as scheduler:
        generations = [scheduler.submit(request(tokens, 8, cache=EXACT)) for tokens in prompts]
        gate.open()
        results = await asyncio.gather(*map(outcome, generations))
        assert (3, 1) in gate.batches
        assert [result.tokens for result in results] == [expected(smollm2, tokens, 8) for tokens in prompts]


async def test_decode_steps_go_through_the_decoder(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    call = Decoder.__call__

    def counted(self: Decoder, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(args[0].shape[1])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "__call__", counted)
    async with make_scheduler() as scheduler:
        result = await outcome(scheduler.submit(request(ids(STORY), 8, cache=EXACT)))
    assert result.tokens == expected(smollm2, ids(STORY), 8)
    assert steps == [1] * 7


async def test_a_quantized_batch_decides_as_each_alone(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    """The same tokens; and row by row the same, but where a batch's other rounding tips the scale."""
    prompts = {"story": ids(STORY * 5), "lists": ids(LISTS * 6)}
    async with make_scheduler(prefix_reuse=False, requantize_wait=True) as scheduler:

        def begun(name: str, session: str) -> Generation:
            return scheduler.submit(request(prompts[name], 20, session_id=session, keep=True))

        def kept(session: str) -> SequenceCache:
            found = scheduler.sessions.idle.peek(("", session))
            assert found is not None
            return found.sequence

        together = [begun(name, f"{name} of two") for name in prompts]
        gate.open()
        batch = await asyncio.gather(*map(outcome, together))
        assert (2, 1) in gate.batches
        for name, result in zip(prompts, batch, strict=True):
            assert result.tokens == (await outcome(begun(name, name))).tokens
            unlike = differing(kept(f"{name} of two"), kept(name))
            assert unlike["tags"] <= 0.01
            assert max(unlike["key meta"], unlike["value meta"]) <= 0.005
            assert max(unlike["key rows"], unlike["value rows"]) <= 0.005


async def test_a_long_prompt_does_not_hold_up_others(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    async with make_scheduler(prefill_chunk=16) as scheduler:
        first = scheduler.submit(request(ids(STORY)[:16], 12, cache=EXACT))
        second = scheduler.submit(request(ids(STORY * 4)[:80], 2, cache=EXACT))
        gate.open()
        await asyncio.gather(outcome(first), outcome(second))
    start = gate.batches.index((1, 16))
    assert gate.batches[start : start + 12] == [(1, 16), (1, 1)] * 5 + [(1, 16), (2, 1)]


async def test_a_step_takes_as_many_short_prompts_as_fit(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    async with make_scheduler(prefill_chunk=16) as scheduler:
        first = scheduler.submit(request(ids(STORY)[:16], 9, cache=EXACT))
        others = [scheduler.submit(request(ids(LISTS)[:6], 2, cache=EXACT)) for _ in range(3)]
        gate.open()
        await asyncio.gather(*map(outcome, (first, *others)))
    start = gate.batches.index((1, 16))
    shapes = gate.batches[start : start + 8]
    assert shapes == [(1, 16), (1, 1), (1, 6), (1, 6), (1, 4), (3, 1), (1, 2), (2, 1)]


async def test_the_first_token_does_not_wait_for_packing(
    make_scheduler: MakeScheduler, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs, may_pack, pack = threading.Event(), threading.Event(), SequenceCache._pack_prompt

    def held(self: SequenceCache) -> None:
        packs.set()
        assert may_pack.wait(60)
        pack(self)

    monkeypatch.setattr(SequenceCache, "_pack_prompt", held)
    async with make_scheduler() as scheduler:
        running = scheduler.submit(request(ids(STORY * 6), 3))
        told = [await running.replies.get() for _ in range(2)]
        assert [reply.WhichOneof("event") for reply in told] == ["prefill", "token"]
        assert await asyncio.to_thread(packs.wait, 60)
        may_pack.set()
        assert len((await outcome(running)).tokens) == 2


async def test_a_prompt_that_cannot_be_packed_ends_its_generation(
    make_scheduler: MakeScheduler, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: SequenceCache) -> None:
        raise torch.OutOfMemoryError

    async with make_scheduler() as scheduler:
        with monkeypatch.context() as patch:
            patch.setattr(SequenceCache, "_pack_prompt", full)
            with pytest.raises(ResourceExhausted):
                await outcome(scheduler.submit(request(ids(STORY * 6), 3)))
        assert scheduler.state.running == 0
        assert len((await outcome(scheduler.submit(request(ids(STORY * 6), 3)))).tokens) == 3


async def test_a_first_token_that_is_the_last_one_tells_what_was_packed(
    make_scheduler: MakeScheduler, ids: Ids
) -> None:
    async with make_scheduler() as scheduler:
        done = (await outcome(scheduler.submit(request(ids(STORY * 6), 1)))).done
        assert done is not None
        cache = done.usage.cache
        assert cache.kv_bytes < cache.kv_bytes_fp16
