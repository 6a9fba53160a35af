"""Elastic precision: caches give way to a budget while they are used, and get their bits back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from prometheus_client import REGISTRY

from qaq_core import InProcessOriginals, SequenceCache
from services.worker import memory_controller
from services.worker.generation import Generation
from services.worker.memory_controller import MemoryController
from services.worker.scheduler.scheduler import Scheduler
from tests.services.worker.conftest import EXACT, LISTS, STORY, MakeScheduler, outcome, request, until
from tests.shallow import TOKEN_BYTES

Ids = Callable[[str], list[int]]
MANY = 6


@pytest.fixture(autouse=True)
def each_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """λ may change at every step: how far it comes before the caches have grown does not depend on the machine."""
    monkeypatch.setattr(memory_controller, "MIN_INTERVAL_S", 0.0)


def sequences(scheduler: Scheduler) -> list[SequenceCache]:
    return [g.session.sequence for g in list(scheduler.batch.running) if g.session is not None]


def bits(scheduler: Scheduler) -> float:
    """Mean code bits an element over all that decode."""
    sums = [0, 0]
    for sequence in sequences(scheduler):
        for side in (0, 1):
            for width, count in sequence.packed.histogram(side).items():
                sums[0] += width * count
                sums[1] += count
    return sums[0] / max(1, sums[1])


def squeezing(scheduler: Scheduler, share: float) -> int:
    """A budget that leaves this share of what is packed now. What is exact cannot be squeezed: a budget for less of it
    would preempt a sequence."""
    exact = sum(sequence.residual.nbytes for sequence in sequences(scheduler))
    return exact + int(share * (scheduler.state.kv_bytes - exact))


async def decoding(generation: Generation) -> None:
    """Waits until a generation decodes. Its prompt is packed by then, which it is not yet at its first token."""
    for _ in range(2):
        await next_token(generation)


async def next_token(generation: Generation) -> None:
    while True:
        reply = await generation.replies.get()
        assert not isinstance(reply, Exception), reply
        if reply.WhichOneof("event") == "token":
            return


async def test_streams_go_on_while_memory_shrinks_and_comes_back(make_scheduler: MakeScheduler, ids: Ids) -> None:
    prompts = [ids(STORY * 5 + LISTS * i)[: 120 + 8 * i] for i in range(MANY)]
    async with make_scheduler(InProcessOriginals(), kv_min_bits=0.6, prefix_reuse=False) as scheduler:
        running = [scheduler.submit(request(tokens, 3000)) for tokens in prompts]
        for generation in running:
            await decoding(generation)
        before = bits(scheduler)
        budget = squeezing(scheduler, 0.7)
        scheduler.set_budget(budget)
        await until(lambda: scheduler.state.kv_bytes <= budget)
        assert REGISTRY.get_sample_value("qaq_kv_lambda") > 0
        squeezed = bits(scheduler)
        assert squeezed < 0.8 * before
        floors = {sequence.rate.floor for sequence in sequences(scheduler)}
        assert len(floors) == 1  # one price for all
        for generation in running:
            await next_token(generation)
        scheduler.set_budget(None)
        await until(lambda: bits(scheduler) > 0.93 * before)
        assert REGISTRY.get_sample_value("qaq_kv_lambda") == 0
        for generation in running:
            await next_token(generation)
            scheduler.cancel(generation.call)
        await until(lambda: scheduler.state.running == 0)


async def test_more_are_admitted_than_fit_at_full_bits(make_scheduler: MakeScheduler, ids: Ids) -> None:
    """A budget for two caches in half precision holds all of six; one more exact one has to wait for them."""
    prompts = [ids(STORY * 8 + LISTS * i)[:160] for i in range(MANY)]
    half = (160 + 36) * TOKEN_BYTES
    async with make_scheduler(kv_budget_bytes=3 * half, max_sequences=MANY + 1, prefix_reuse=False) as scheduler:
        running = [scheduler.submit(request(tokens, 3000)) for tokens in prompts]
        for generation in running:
            await decoding(generation)
        assert scheduler.state.running == MANY
        assert scheduler.state.kv_bytes <= 3 * half
        waits = scheduler.submit(request(prompts[0], 1, cache=EXACT))
        await until(lambda: scheduler.state.waiting == 1)
        await decoding(running[-1])  # in which it is not admitted
        assert scheduler.state.waiting == 1
        for generation in running:
            scheduler.cancel(generation.call)
        assert (await outcome(waits)).tokens


async def test_a_budget_that_changes_is_looked_at_at_once(
    make_scheduler: MakeScheduler, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while no sequence has come to the price of the budget before."""
    monkeypatch.setattr(MemoryController, "_apply_floor", lambda self, present: False)
    async with make_scheduler(InProcessOriginals(), kv_min_bits=0.6, prefix_reuse=False) as scheduler:
        running = scheduler.submit(request(ids(STORY * 6), 3000))
        await decoding(running)
        held, memory, before = scheduler.state.kv_bytes, scheduler.sessions.memory, 0.0
        for share in (0.95, 0.9):
            scheduler.set_budget(int(share * held))
            await until(lambda before=before: memory.lam > before)
            before = memory.lam
        scheduler.cancel(running.call)


@pytest.mark.timeout(120)
async def test_an_idle_session_that_recovers_keeps_no_price(
    make_scheduler: MakeScheduler, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fetches nothing until it decodes again, so that nobody may wait for it."""
    async with make_scheduler(InProcessOriginals(), kv_min_bits=0.6, prefix_reuse=False) as scheduler:
        leaves = scheduler.submit(request(ids(STORY * 6), 3000, session_id="idle", keep=True))
        running = scheduler.submit(request(ids(STORY * 8), 3000))
        await decoding(leaves)
        await next_token(running)
        budget, memory = squeezing(scheduler, 0.7), scheduler.sessions.memory
        scheduler.set_budget(budget)
        await until(lambda: scheduler.state.kv_bytes <= budget)
        scheduler.cancel(leaves.call)
        await until(lambda: len(scheduler.sessions.idle) == 1)
        (idle,) = scheduler.sessions.idle
        high = memory.lam
        monkeypatch.setattr(MemoryController, "_search", lambda self, sampled, bits: self.lam / 2)
        scheduler.set_budget(8 * budget)
        await until(lambda: memory.lam < high / 10)
        assert idle.sequence.rate.recovering
        scheduler.cancel(running.call)


async def test_a_budget_that_should_be_kept_without_a_price_gets_one(
    make_scheduler: MakeScheduler, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors may hold more than they would be given now."""
    monkeypatch.setattr(MemoryController, "_search", lambda self, sampled, bits: 0.0)
    async with make_scheduler(InProcessOriginals(), kv_min_bits=0.6, prefix_reuse=False) as scheduler:
        running = scheduler.submit(request(ids(STORY * 6), 3000))
        await decoding(running)
        budget = int(0.95 * scheduler.state.kv_bytes)
        scheduler.set_budget(budget)
        await until(lambda: scheduler.state.kv_bytes <= budget)
        scheduler.cancel(running.call)


async def test_full_staging_admits_nobody(make_scheduler: MakeScheduler, ids: Ids) -> None:
    class Away(InProcessOriginals):
        """A store whose pages are under way for as long as the test says."""

        pending_bytes = 0

    from services.common.errors import ResourceExhausted

    store = Away()
    async with make_scheduler(store, staging_budget_bytes=1000) as scheduler:
        running = scheduler.submit(request(ids(STORY), 3000, cache=EXACT))
        await decoding(running)
        store.pending_bytes = 1001
        with pytest.raises(ResourceExhausted, match="QAQ_STAGING_BUDGET_BYTES") as refused:
            scheduler.submit(request(ids(STORY), 1))
        assert refused.value.retry_after_ms
        for _ in range(3):
            await next_token(running)  # who runs goes on
        store.pending_bytes = 0
        assert (await asyncio.wait_for(outcome(scheduler.submit(request(ids(STORY), 1))), 120)).tokens
        scheduler.cancel(running.call)
