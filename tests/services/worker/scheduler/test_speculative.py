"""Prompt lookup on the worker: the tokens of plain decoding, in fewer passes."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY
from qaq.v1 import common_pb2

from tests.services.worker.conftest import EXACT, LISTS, STORY, Gate, Ids, MakeScheduler, outcome, request

BALANCED = common_pb2.CacheParams(preset="balanced")
PAPER = common_pb2.CacheParams(preset="paper")


def counted() -> tuple[float, float]:
    """Tokens drafted and accepted so far."""
    names = ("qaq_drafted_tokens_total", "qaq_accepted_tokens_total")
    drafted, accepted = (REGISTRY.get_sample_value(name) or 0.0 for name in names)
    return drafted, accepted


def passes(gate: Gate) -> list[int]:
    """Tokens of each pass that decoded."""
    return [tokens for _, tokens in gate.batches if tokens < 9]


@pytest.mark.parametrize(("cache", "most"), [(EXACT, 8), (BALANCED, 4)], ids=["fp16", "balanced"])
async def test_greedy_tokens_are_those_of_plain_decoding(
    make_scheduler: MakeScheduler, ids: Ids, gate: Gate, cache: common_pb2.CacheParams, most: int
) -> None:
    gate.open()
    results, steps = [], []
    for tokens in (0, 7):
        gate.batches.clear()
        before = counted()
        async with make_scheduler(speculative_tokens=tokens, requantize_wait=True) as scheduler:
            results.append(await outcome(scheduler.submit(request(ids(STORY * 4), 60, cache=cache))))
        steps.append(passes(gate))
        drafted, accepted = (now - then for now, then in zip(counted(), before, strict=True))
        if tokens:
            assert drafted == sum(n - 1 for n in steps[-1])
            assert 30 < accepted <= drafted
            assert len(steps[-1]) == 59 - accepted
    plain, drafting = results
    assert drafting.tokens == plain.tokens
    assert drafting.text == plain.text
    assert len(steps[0]) == 59
    assert max(steps[1]) == most
    for result in results:
        assert result.done is not None
        assert result.done.reason == common_pb2.FINISH_REASON_LENGTH
        assert result.done.usage.generated_tokens == 60
        assert result.done.usage.cache.tokens == len(ids(STORY * 4)) + 59


async def test_sampled_tokens_and_logprobs_are_those_of_plain_decoding(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async def run(tokens: int) -> list[common_pb2.Token]:
        sampling = common_pb2.SamplingParams(temperature=0.7, top_p=0.9, seed=3, repetition_penalty=1.05)
        output = common_pb2.OutputParams(logprobs=True)
        wanted = request(ids(STORY * 4), 40, sampling=sampling, output=output, cache=EXACT)
        async with make_scheduler(speculative_tokens=tokens) as scheduler:
            generation = scheduler.submit(wanted)
            await outcome(generation, sent := [])
            return sent

    before = counted()
    plain, drafting = await run(0), await run(4)
    assert [token.token_id for token in drafting] == [token.token_id for token in plain]
    assert [token.index for token in drafting] == list(range(40))
    logprobs = [token.info.logprob for token in plain]
    assert [token.info.logprob for token in drafting] == pytest.approx(logprobs, abs=1e-3)
    assert counted()[1] > before[1]


async def test_what_ends_a_generation_ends_it_inside_an_accepted_run(make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY * 4)
    async with make_scheduler(speculative_tokens=7) as scheduler:
        full = await outcome(scheduler.submit(request(tokens, 30, cache=EXACT)))
        whole, words = full.tokens, full.text
        for new in range(21, 25):
            result = await outcome(scheduler.submit(request(tokens, new, cache=EXACT, session_id="s", keep=True)))
            assert result.tokens == whole[:new]
            assert result.done is not None
            assert result.done.usage.cache.tokens == len(tokens) + new - 1
            await asyncio.wrap_future(scheduler.drop("s"))
            # By a token id, at a place where it is new.
            last = whole[new - 1]
            at = whole.index(last) + 1
            stop = common_pb2.StopParams(max_new_tokens=60, ignore_eos=True, stop_token_ids=[last])
            ended = await outcome(scheduler.submit(request(tokens, stop=stop, cache=EXACT)))
            assert ended.tokens == whole[:at]
            assert ended.done is not None
            assert (ended.done.reason, ended.done.stop_token_id) == (common_pb2.FINISH_REASON_STOP, last)
        middle = words[len(words) // 2 : len(words) // 2 + 12]
        stop = common_pb2.StopParams(max_new_tokens=60, ignore_eos=True, stop=[middle])
        ended = await outcome(scheduler.submit(request(tokens, stop=stop, cache=EXACT)))
        assert ended.done is not None
        assert (ended.text, ended.done.reason) == (words[: words.index(middle)], common_pb2.FINISH_REASON_STOP)


async def test_a_session_goes_on_and_its_pages_are_reported(make_scheduler: MakeScheduler, ids: Ids) -> None:
    """Two turns, and a third that begins elsewhere with the pages of the first two."""

    async def run(tokens: int) -> list[list[int]]:
        log, turns = ids(STORY * 4), []
        async with make_scheduler(speculative_tokens=tokens, requantize_wait=True) as scheduler:
            for _ in range(2):
                result = await outcome(
                    scheduler.submit(request(log, 50, cache=EXACT, session_id="s", keep=True, tenant="t"))
                )
                turns.append(result.tokens)
                log = [*log, *result.tokens, *ids(LISTS)]
                assert len(result.pages) >= (len(log) - len(ids(LISTS)) - 51) // 32
        return turns

    assert await run(7) == await run(0)


async def test_several_sequences_are_decoded_one_by_one(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    """Drafts are for a sequence that is alone; it gets them again when the others have gone."""
    async with make_scheduler(speculative_tokens=7) as scheduler:
        both = [scheduler.submit(request(ids(STORY * 4), new, cache=EXACT)) for new in (50, 10)]
        gate.open()
        long, short = await asyncio.gather(*map(outcome, both))
        assert long.tokens[:10] == short.tokens
        assert all(tokens == 1 for batch, tokens in gate.batches if batch == 2)
        assert any(1 < tokens < 9 for batch, tokens in gate.batches if batch == 1)


async def test_a_cache_without_room_is_decoded_one_by_one(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    """The paper's method reviews its tokens after every step."""
    gate.open()
    async with make_scheduler(speculative_tokens=7) as scheduler:
        await outcome(scheduler.submit(request(ids(STORY * 4), 12, cache=PAPER)))
    assert passes(gate) == [1] * 11
