"""Preemption: whole generations give way, and clients see nothing but a gap."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from qaq.v1 import common_pb2, worker_pb2

from qaq_core import InProcessOriginals, Page
from qaq_core.models import LoadedModel
from services.common.errors import FailedPrecondition, Unavailable
from services.worker.generation import Generation
from services.worker.scheduler.scheduler import Scheduler
from services.worker.state import WorkerState
from tests.services.worker.conftest import EXACT, LISTS, STORY, Gate, MakeScheduler, expected, outcome, request, until
from tests.services.worker.test_memory_controller import bits
from tests.shallow import TOKEN_BYTES

Ids = Callable[[str], list[int]]
SMALL = {"page_tokens": 16, "prefix_recompute_tokens": 1}
LONG = 4000


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def preempted() -> float:
    return metric("qaq_preempted_total")


def passed() -> float:
    return metric("qaq_kv_budget_exceeded_total")


def prompts(ids: Ids, many: int, tokens: int) -> list[list[int]]:
    """Of one length, none of which begins as another."""
    text = ids(STORY * 12)
    return [text[7 * i : 7 * i + tokens] for i in range(many)]


async def choices(generation: Generation, many: int) -> list[tuple[list[int], str, list[float], Any]]:
    """Tokens, text, log-probabilities and last message of each choice."""
    found: list[Any] = [([], [], []) for _ in range(many)]
    done: dict[int, common_pb2.Finished] = {}
    while len(done) < many:
        reply = await generation.replies.get()
        assert not isinstance(reply, Exception), reply
        match reply.WhichOneof("event"):
            case "token":
                tokens, text, logprobs = found[reply.token.choice]
                tokens.append(reply.token.token_id)
                text.append(reply.token.text)
                logprobs.append(reply.token.info.logprob)
            case "finished":
                done[reply.finished.choice] = reply.finished
    return [
        (tokens, "".join(text) + done[i].text, logprobs, done[i]) for i, (tokens, text, logprobs) in enumerate(found)
    ]


@asynccontextmanager
async def one_gives_way(
    make_scheduler: MakeScheduler, ids: Ids, second: worker_pb2.RunRequest, store: InProcessOriginals | None = None
) -> AsyncIterator[tuple[Scheduler, Generation, Generation]]:
    """An engine, an exact stream without end that runs, and that of `second`, which is paused."""
    async with make_scheduler(store, **SMALL) as scheduler:
        generations = [scheduler.submit(request(ids(STORY * 3), LONG, cache=EXACT)), scheduler.submit(second)]
        await begun(*generations)
        squeeze(scheduler)
        await until(lambda: scheduler.state.waiting == max(1, second.choices))
        assert scheduler.state.running == 1
        yield scheduler, generations[0], generations[1]


async def begun(*generations: Generation) -> None:
    """Waits for their first tokens, which come with the first message of a prompt of one chunk."""
    await until(lambda: not any(generation.replies.empty() for generation in generations))


async def goes_on(generation: Generation) -> None:
    """Waits for some more of its tokens."""
    here = generation.replies.qsize()
    await until(lambda: generation.replies.qsize() >= here + 3)


def squeeze(scheduler: Scheduler) -> None:
    """What is held now is too much."""
    scheduler.set_budget(scheduler.state.kv_bytes - 1)


async def test_all_streams_finish_within_a_budget_that_is_too_small(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids
) -> None:
    """Three prompts are admitted, of which only two have room for their answers."""
    asked = list(zip(prompts(ids, 3, 60), (24, 60, 44), strict=True))
    budget = 252 * TOKEN_BYTES  # tokens in half precision, if nothing else were held
    steps: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            steps.append(sum(s.sequence.nbytes for s in scheduler.batch.sessions if not s.prefilling))

    before = preempted(), passed(), metric("qaq_prompt_tokens_total", source="stored")
    handle = smollm2.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        async with make_scheduler(kv_budget_bytes=budget, **SMALL) as scheduler:
            running = [scheduler.submit(request(tokens, new, cache=EXACT)) for tokens, new in asked]
            results = await asyncio.gather(*map(outcome, running))
    finally:
        handle.remove()
    assert max(steps) > 0.8 * budget
    # What one step adds may be too much; then the next one is not begun with it.
    assert all(min(pair) <= budget for pair in itertools.pairwise(steps))
    assert 1 <= preempted() - before[0] <= 2  # who comes back stays
    assert passed() == before[1]
    assert metric("qaq_prompt_tokens_total", source="stored") >= before[2] + 60 // 16 * 16
    for (tokens, new), result in zip(asked, results, strict=True):
        assert result.tokens == expected(smollm2, tokens, new)
        assert result.text == smollm2.tokenizer.decode(result.tokens)
        assert result.progress == [(60, 60)]
        assert result.done is not None
        usage = result.done.usage
        assert (usage.prompt_tokens, usage.generated_tokens, usage.loaded_tokens) == (60, new, 0)
        assert usage.cache.tokens == 60 + new - 1


async def test_elastic_caches_give_way_to_the_floor_and_no_further(make_scheduler: MakeScheduler, ids: Ids) -> None:
    before = preempted()
    async with make_scheduler(kv_min_bits=1.5, **SMALL) as scheduler:
        running = [scheduler.submit(request(tokens, LONG)) for tokens in prompts(ids, 3, 160)]
        await begun(*running)
        window = sum(session.sequence.residual.nbytes for session in scheduler.batch.sessions)
        scheduler.set_budget(window + int(0.4 * (scheduler.state.kv_bytes - window)))
        await until(lambda: scheduler.state.waiting > 0)
        assert preempted() > before
        assert bits(scheduler) > 1.2
        for generation in running[:2]:
            scheduler.cancel(generation.call)
        await until(lambda: scheduler.state == replace(scheduler.state, running=1, waiting=0))
        await goes_on(running[2])
        scheduler.cancel(running[2].call)


async def test_it_comes_back_when_there_is_room(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, gate: Gate
) -> None:
    """What is stored of it is loaded, the rest is computed; the next token is the next of its stream."""
    gate.open()
    tokens = ids(LISTS * 3)
    async with one_gives_way(make_scheduler, ids, request(tokens, 40, cache=EXACT)) as (scheduler, first, second):
        gone_on = len(gate.batches)
        scheduler.set_budget(None)
        result = await outcome(second)
        assert result.tokens == expected(smollm2, tokens, 40)
        chunk = next(shape for shape in gate.batches[gone_on:] if shape[0] == 1 and shape[1] > 1)
        assert chunk[1] <= 16
        whole = (len(tokens) + 39) // 16
        assert len(result.pages) == whole
        scheduler.cancel(first.call)


async def test_it_comes_back_when_it_is_alone(smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids) -> None:
    """Whatever there is room for."""
    tokens, store = ids(LISTS * 3), InProcessOriginals()
    asked = request(tokens, 40, cache=EXACT)
    async with one_gives_way(make_scheduler, ids, asked, store) as (scheduler, first, second):
        scheduler.set_budget(1)
        await goes_on(first)
        assert scheduler.state.waiting == 1
        scheduler.cancel(first.call)
        result = await outcome(second)
        assert result.tokens == expected(smollm2, tokens, 40)
    assert store.nbytes == 0  # nothing is held any more


async def test_who_comes_later_waits_behind_who_is_paused(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with one_gives_way(make_scheduler, ids, request(ids(LISTS), LONG, cache=EXACT)) as (scheduler, first, second):
        later = scheduler.submit(request(ids("A word"), 1, cache=EXACT))
        await goes_on(first)
        assert scheduler.state.waiting == 2
        assert later.replies.empty()
        scheduler.cancel(second.call)
        assert (await outcome(later)).tokens
        scheduler.cancel(first.call)


async def test_sampling_stop_and_likelihoods_go_on(make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(LISTS * 2)
    sampling = common_pb2.SamplingParams(temperature=0.8, seed=11, frequency_penalty=0.5)
    asked: dict[str, Any] = {"cache": EXACT, "sampling": sampling, "choices": 2}
    asked["output"] = common_pb2.OutputParams(logprobs=True)
    async with make_scheduler(**SMALL) as scheduler:
        calm = await choices(scheduler.submit(request(tokens, 40, **asked)), 2)
    text = calm[1][1]
    stop = text[2 * len(text) // 3 :][:6]
    asked["stop"] = common_pb2.StopParams(max_new_tokens=40, stop=[stop], ignore_eos=True)
    before = preempted()
    async with one_gives_way(make_scheduler, ids, request(tokens, **asked)) as (scheduler, first, second):
        assert preempted() == before + 2  # both choices of the call
        scheduler.set_budget(None)
        found = await choices(second, 2)
        scheduler.cancel(first.call)
    for mine, theirs in zip(found, calm, strict=True):
        assert mine[0] == theirs[0][: len(mine[0])]
        assert mine[2] == pytest.approx(theirs[2][: len(mine[2])], abs=2e-2)
        assert mine[3].usage.generated_tokens == len(mine[0])
    assert found[1][3].reason == common_pb2.FINISH_REASON_STOP
    assert found[1][1] == text[: text.index(stop)]


async def test_a_lone_call_gives_way_choice_by_choice(make_scheduler: MakeScheduler, ids: Ids) -> None:
    asked = request(ids(STORY * 3), 32, cache=EXACT, choices=3, sampling=common_pb2.SamplingParams(seed=3))
    async with make_scheduler(**SMALL) as scheduler:
        calm = await choices(scheduler.submit(asked), 3)
        before = preempted(), passed()
        again = scheduler.submit(asked)
        await until(lambda: scheduler.state.running == 3)
        squeeze(scheduler)
        await until(lambda: scheduler.state.waiting > 0)
        assert scheduler.state.running > 0
        found = await choices(again, 3)
        assert preempted() > before[0]
        assert passed() == before[1]
    assert [each[0] for each in found] == [each[0] for each in calm]


async def test_a_lone_stream_passes_the_budget(smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(LISTS * 2)
    before = preempted(), passed()
    async with make_scheduler(kv_budget_bytes=(len(tokens) + 36) * TOKEN_BYTES, **SMALL) as scheduler:
        result = await outcome(scheduler.submit(request(tokens, 80, cache=EXACT)))
        assert result.done is not None
        assert result.done.usage.cache.kv_bytes > scheduler.budget
    assert result.tokens == expected(smollm2, tokens, 80)
    assert (preempted(), passed()) == (before[0], before[1] + 1)


class Down(InProcessOriginals):
    """A store that takes nothing while it is down, and then all that came meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.down = False
        self.came: list[tuple[Sequence[Page], Future[None]]] = []

    def put(self, pages: Sequence[Page]) -> Future[None]:
        if not self.down:
            return super().put(pages)
        answer: Future[None] = Future()
        self.came.append((pages, answer))
        return answer

    def recover(self) -> None:
        self.down = False
        for pages, answer in self.came:
            super().put(pages)
            answer.set_result(None)


async def test_nobody_is_paused_whose_pages_the_store_has_not(make_scheduler: MakeScheduler, ids: Ids) -> None:
    before, store = (preempted(), passed()), Down()
    async with make_scheduler(store, **SMALL) as scheduler:
        running = [scheduler.submit(request(tokens, LONG, cache=EXACT)) for tokens in prompts(ids, 2, 60)]
        await begun(*running)
        store.down = True
        await until(lambda: len(store.came) >= 4)
        squeeze(scheduler)
        await until(lambda: passed() > before[1])
        for generation in running:
            await goes_on(generation)
        assert (preempted(), passed()) == (before[0], before[1] + 1)
        store.recover()
        await until(lambda: scheduler.state.waiting == 1)
        assert preempted() == before[0] + 1
        for generation in running:
            scheduler.cancel(generation.call)


async def test_cancelled_while_it_is_paused(make_scheduler: MakeScheduler, ids: Ids) -> None:
    store = InProcessOriginals()
    asked = request(ids(LISTS), LONG, cache=EXACT, session_id="s", keep=True)
    async with one_gives_way(make_scheduler, ids, asked, store) as (scheduler, first, second):
        scheduler.cancel(second.call)
        await until(lambda: scheduler.state.waiting == 0)
        await goes_on(first)
        scheduler.cancel(first.call)
        await until(lambda: scheduler.state.running == 0)
        assert scheduler.state == WorkerState()
        assert store.nbytes == 0


async def test_dropped_while_it_is_paused(make_scheduler: MakeScheduler, ids: Ids) -> None:
    asked = request(ids(LISTS), LONG, cache=EXACT, session_id="s", keep=True)
    async with one_gives_way(make_scheduler, ids, asked) as (scheduler, first, second):
        assert await asyncio.wrap_future(scheduler.drop("s"))
        assert scheduler.state.waiting == 0
        with pytest.raises(FailedPrecondition, match="dropped"):
            await outcome(second)
        await goes_on(first)
        scheduler.cancel(first.call)


async def test_stopping_ends_who_is_paused(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with one_gives_way(make_scheduler, ids, request(ids(LISTS), LONG, cache=EXACT)) as (scheduler, first, second):
        assert await asyncio.to_thread(scheduler.drain, 5.0) == 2
    for generation in (first, second):
        with pytest.raises(Unavailable, match="again"):
            await outcome(generation)
    assert scheduler.state == WorkerState()


async def test_a_kept_session_goes_on_after_a_pause(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids
) -> None:
    asked = request(ids(LISTS), 40, cache=EXACT, session_id="s", keep=True)
    async with one_gives_way(make_scheduler, ids, asked) as (scheduler, first, second):
        scheduler.cancel(first.call)
        result = await outcome(second)
        assert result.tokens == expected(smollm2, ids(LISTS), 40)
        log = ids(LISTS) + result.tokens + ids(STORY)
        next_turn = await outcome(scheduler.submit(request(log, 8, cache=EXACT, session_id="s", keep=True)))
        assert next_turn.tokens == expected(smollm2, log, 8)
