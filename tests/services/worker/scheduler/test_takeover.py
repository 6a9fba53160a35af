"""A generation goes on for the router that has its session now."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY
from qaq.v1 import common_pb2, worker_pb2

from qaq_core.models import LoadedModel
from services.common.errors import StatusError
from services.worker.generation import Generation
from tests.services.worker.conftest import (
    EXACT,
    STORY,
    Gate,
    Ids,
    MakeScheduler,
    Outcome,
    expected,
    outcome,
    request,
    settled,
    until,
)

NEW = 48
AT = 12


def asked(tokens: list[int], fence: int, new: int = NEW, **fields: Any) -> worker_pb2.RunRequest:
    return request(tokens, new, cache=EXACT, session_id="s", fence=fence, **fields)


def rest(tokens: list[int], known: list[int], fence: int, **fields: Any) -> worker_pb2.RunRequest:
    """As a router asks when its client has received the `known` tokens of a turn."""
    return asked([*tokens, *known], fence, generated_tokens=len(known), **fields)


async def begun(generation: Generation, tokens: int = AT) -> list[int]:
    """Its first tokens."""
    found: list[int] = []
    while len(found) < tokens:
        reply = await generation.replies.get()
        assert not isinstance(reply, Exception), reply
        if reply.HasField("token"):
            found.append(reply.token.token_id)
    return found


async def taken(generation: Generation) -> None:
    """It has ended because its session was taken."""
    with pytest.raises(StatusError, match="has taken it") as caught:
        await outcome(generation)
    assert caught.value.code is grpc.StatusCode.ABORTED


def computed() -> float:
    return REGISTRY.get_sample_value("qaq_prompt_tokens_total", {"source": "computed"}) or 0.0


@pytest.mark.parametrize("received", [0, 5, AT])
async def test_the_later_call_gets_the_rest_and_nothing_is_computed_twice(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids, received: int
) -> None:
    tokens, sent = ids(STORY), list[common_pb2.Token]()
    whole = expected(smollm2, tokens, NEW)
    async with make_scheduler() as scheduler:
        hung = scheduler.submit(asked(tokens, fence=1))
        first, call = await begun(hung), hung.call
        before = computed()
        other = scheduler.submit(rest(tokens, first[:received], fence=2))
        result = await outcome(other, sent)
        assert computed() == before
        while not isinstance(reply := await call.replies.get(), Exception):
            pass
        assert isinstance(reply, StatusError)
        assert reply.code is grpc.StatusCode.ABORTED
    assert [token.index for token in sent] == list(range(received, NEW))
    assert [token.token_id for token in sent] == whole[received:]
    assert result.done is not None
    usage = result.done.usage
    assert (usage.prompt_tokens, usage.generated_tokens) == (len(tokens), NEW)


@pytest.mark.parametrize("preset", ["fp16", "balanced"])
async def test_what_was_left_waits_and_goes_on(
    make_scheduler: MakeScheduler, ids: Ids, gate: Gate, preset: str
) -> None:
    """Its router is gone. Nothing is decoded until the next one asks, and then the tokens are those of one stream."""
    tokens, cache, new = ids(STORY), common_pb2.CacheParams(preset=preset), 20
    gate.open()
    async with make_scheduler(max_sequences=2, requantize_wait=True) as scheduler:
        whole = (await outcome(scheduler.submit(request(tokens, new, cache=cache)))).tokens
        turn = {"cache": cache, "session_id": "s"}
        lost = scheduler.submit(request(tokens, new, fence=1, **turn))
        first = await begun(lost, new // 4)
        gate.shut()
        scheduler.leave(lost.call)
        gate.open()
        await outcome(scheduler.submit(request(tokens, 2)))  # others go on beside it
        assert scheduler.state.running == 1
        assert len(first) + lost.replies.qsize() < new
        before = computed()
        rest = request([*tokens, *first], new, fence=2, generated_tokens=len(first), **turn)
        assert first + (await outcome(scheduler.submit(rest))).tokens == whole
        assert computed() == before
        await settled(scheduler, running=0, sessions=0)


async def test_what_was_left_ends_when_nobody_wants_it(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler() as scheduler:
        lost = scheduler.submit(asked(ids(STORY), fence=1, new=4000))
        await begun(lost, 1)
        scheduler.leave(lost.call)
        scheduler.cancel(lost.call)
        await settled(scheduler, running=0, sessions=0, kv_bytes=0)


async def test_what_was_left_in_its_prompt_goes_on_from_there(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids, gate: Gate
) -> None:
    """And what waits for its turn has nothing to keep."""
    tokens = ids(STORY)
    gate.open()
    whole = expected(smollm2, tokens, 8)
    gate.shut()
    gate.batches.clear()
    async with make_scheduler(max_sequences=1) as scheduler:
        before = computed()
        lost, queued = (scheduler.submit(asked(tokens, fence=1, new=8, tenant=tenant)) for tenant in ("", "another"))
        await until(lambda: bool(gate.batches))
        for generation in (lost, queued):
            scheduler.leave(generation.call)
        gate.open()
        await settled(scheduler, running=1, waiting=0)
        assert (await outcome(scheduler.submit(asked(tokens, fence=2, new=8)))).tokens == whole
        assert computed() == before + len(tokens)


async def test_the_end_of_the_call_before_ends_nothing(make_scheduler: MakeScheduler, ids: Ids) -> None:
    """The worker learns late that the router which hung is gone."""
    tokens = ids(STORY)
    async with make_scheduler() as scheduler:
        hung = scheduler.submit(asked(tokens, fence=1))
        first, call = await begun(hung), hung.call
        other = scheduler.submit(rest(tokens, first, fence=1))  # of one router that lost its connection
        await begun(other, 1)
        scheduler.cancel(call)
        again = scheduler.submit(rest(tokens, first, fence=3))
        assert isinstance(await outcome(again), Outcome)


async def test_the_call_that_took_it_frees_it(make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY)
    async with make_scheduler() as scheduler:
        first = await begun(scheduler.submit(asked(tokens, fence=1, new=4000)))
        other = scheduler.submit(rest(tokens, first, fence=2, new=4000))
        await begun(other, 1)
        scheduler.cancel(other.call)
        await until(lambda: scheduler.state.running == 0)


async def test_an_earlier_hold_takes_nothing(make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids) -> None:
    tokens = ids(STORY)
    whole = expected(smollm2, tokens, NEW)
    async with make_scheduler() as scheduler:
        awake = scheduler.submit(asked(tokens, fence=2))
        first = await begun(awake, 4)
        await taken(scheduler.submit(rest(tokens, first, fence=1)))
        assert (await outcome(awake)).tokens == whole[4:]


@pytest.mark.parametrize("change", ["prompt", "sampling", "choices", "tokens that never came"])
async def test_another_turn_begins_anew(make_scheduler: MakeScheduler, ids: Ids, change: str) -> None:
    """Or one whose tokens are not known here: the generation that runs ends."""
    tokens, fields = ids(STORY), dict[str, Any]()
    async with make_scheduler() as scheduler:
        hung = scheduler.submit(asked(tokens, fence=1, new=4000))
        first = await begun(hung)
        known = first
        match change:
            case "prompt":
                tokens = [*tokens[1:], tokens[0]]
            case "sampling":
                fields["sampling"] = common_pb2.SamplingParams(temperature=0, repetition_penalty=1.5)
            case "choices":
                known, fields["choices"] = [], 2
            case "tokens that never came":
                known = [*first[:-1], (first[-1] + 1) % 1000]
        other = scheduler.submit(rest(tokens, known, fence=2, **fields))
        await taken(hung)
        await begun(other, 3)
        scheduler.cancel(other.call)


async def test_without_a_fence_a_call_waits(make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY)
    async with make_scheduler() as scheduler:
        running = scheduler.submit(asked(tokens, fence=0, new=4000))
        await begun(running, 1)
        waiting = scheduler.submit(asked(tokens, fence=0))
        await begun(running, 3)
        assert scheduler.state.waiting == 1
        scheduler.cancel(running.call)
        await asyncio.wait_for(begun(waiting, 1), 60)
        scheduler.cancel(waiting.call)
