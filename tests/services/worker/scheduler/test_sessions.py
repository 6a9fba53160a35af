"""Sessions between generations: what is computed again, what is evicted, what is dropped."""

from __future__ import annotations

import asyncio

import pytest
from qaq.v1 import common_pb2

from qaq_core.models import LoadedModel
from services.common.errors import FailedPrecondition, ResourceExhausted
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
    settled,
)
from tests.shallow import TOKEN_BYTES


async def test_next_turn_computes_what_is_new(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, gate: Gate
) -> None:
    gate.open()
    async with make_scheduler() as scheduler:
        log = ids(STORY)
        for new_text in (LISTS, STORY):
            result = await outcome(scheduler.submit(request(log, 6, cache=EXACT, session_id="s", keep=True)))
            assert result.tokens == expected(smollm2, log, 6)
            assert scheduler.state.sessions == 1
            log = log + result.tokens + ids(new_text)
            gate.batches.clear()
        result = await outcome(scheduler.submit(request(log, 6, cache=EXACT, session_id="s", keep=True)))
        # The last token of the turn before was not in the cache yet.
        assert gate.batches[0] == (1, len(ids(STORY)) + 1)
        assert result.tokens == expected(smollm2, log, 6)


@pytest.mark.parametrize("change", ["diverged", "same", "shorter", "other preset"])
async def test_a_cache_that_does_not_fit_is_rebuilt(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, gate: Gate, change: str
) -> None:
    gate.open()
    async with make_scheduler() as scheduler:
        log = ids(STORY)
        first = await outcome(scheduler.submit(request(log, 4, cache=EXACT, session_id="s", keep=True)))
        held = log + first.tokens
        cache = EXACT
        match change:
            case "diverged":
                log = [*held[:5], held[5] + 1, *held[6:]]
            case "same":
                log = held[:-1]
            case "shorter":
                log = held[:9]
            case _:
                log, cache = held, common_pb2.CacheParams(preset="balanced")
        gate.batches.clear()
        second = await outcome(scheduler.submit(request(log, 4, cache=cache, session_id="s", keep=True)))
        assert gate.batches[0] == (1, len(log))
        assert scheduler.state.sessions == 1
        if cache is EXACT:
            assert second.tokens == expected(smollm2, log, 4)


async def test_two_calls_of_one_session_come_one_after_the_other(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, gate: Gate
) -> None:
    log = ids(STORY)
    async with make_scheduler() as scheduler:
        calls = [request(log, 3, cache=EXACT, session_id="s", keep=True) for _ in range(2)]
        generations = [scheduler.submit(call) for call in (*calls, request(log, 3, cache=EXACT))]
        gate.open()
        results = await asyncio.gather(*map(outcome, generations))
        assert {tuple(result.tokens) for result in results} == {tuple(expected(smollm2, log, 3))}
        # The third has no session to wait for.
        assert max(batch for batch, _ in gate.batches) == 2
        assert scheduler.state.sessions == 1


async def test_least_recently_used_session_goes_first(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    gate.open()
    async with make_scheduler(max_idle_sessions=2) as scheduler:
        for name in ("a", "b", "a", "c"):
            await outcome(scheduler.submit(request(ids(STORY), 1, cache=EXACT, session_id=name, keep=True)))
        assert scheduler.state.sessions == 2
        assert [await asyncio.wrap_future(scheduler.drop(name)) for name in "abc"] == [True, False, True]
        assert await settled(scheduler, sessions=0) == WorkerState()


async def test_dropping_a_session_that_runs(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler() as scheduler:
        generation = scheduler.submit(request(ids(STORY), 5000, cache=EXACT, session_id="s", keep=True))
        await generation.replies.get()
        assert await asyncio.to_thread(lambda: (scheduler.drop("s").result(60), scheduler.state.sessions)) == (True, 0)
        with pytest.raises(FailedPrecondition, match="dropped"):
            await outcome(generation)
        await settled(scheduler, running=0, sessions=0)


async def test_budget_costs_idle_sessions_first(make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY * 4)
    budget = int((len(tokens) + 36) * TOKEN_BYTES * 1.1)
    async with make_scheduler(kv_budget_bytes=budget) as scheduler:
        await outcome(scheduler.submit(request(tokens, 1, cache=EXACT, session_id="old", keep=True)))
        assert scheduler.state.sessions == 1
        await outcome(scheduler.submit(request(tokens, 1, cache=EXACT, session_id="new", keep=True)))
        assert not await asyncio.wrap_future(scheduler.drop("old"))
        assert await asyncio.wrap_future(scheduler.drop("new"))
        with pytest.raises(ResourceExhausted, match="QAQ_KV_BUDGET_BYTES"):
            await outcome(scheduler.submit(request(tokens * 2, 1, cache=EXACT)))
        assert (await outcome(scheduler.submit(request(tokens * 2, 1)))).tokens  # in fewer bits it fits


async def test_a_tenant_finds_no_cache_of_another_one(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    """Neither by a session's id nor as its branch; and it neither replaces nor drops it."""
    gate.open()
    log = ids(STORY)
    async with make_scheduler(prefix_reuse=False) as scheduler:

        async def turn(tenant: str, tokens: list[int], **session: str) -> list[int]:
            asked = request(tokens, 1, cache=EXACT, keep=True, tenant=tenant, **session)
            return (await outcome(scheduler.submit(asked))).tokens

        log += await turn("ada", log, session_id="s")
        log += ids(LISTS)
        for session in ({"session_id": "s"}, {"session_id": "t", "branch_of": "s"}):
            gate.batches.clear()
            await turn("bob", log, **session)
            assert gate.batches[0] == (1, len(log))
        assert scheduler.state.sessions == 3
        assert await asyncio.wrap_future(scheduler.drop("s", "bob"))
        assert not await asyncio.wrap_future(scheduler.drop("s", "bob"))
        gate.batches.clear()
        await turn("ada", log, session_id="s")
        assert gate.batches[0] == (1, len(ids(LISTS)) + 1)
        assert await asyncio.wrap_future(scheduler.drop("s", "ada"))


async def test_a_drop_whose_caller_has_gone_away_ends_nothing_else(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler() as scheduler:
        running = scheduler.submit(request(ids(STORY), 40, cache=EXACT))
        for _ in range(50):
            scheduler.drop("nobody").cancel()
            await asyncio.sleep(0)
        assert len((await outcome(running)).tokens) == 40
