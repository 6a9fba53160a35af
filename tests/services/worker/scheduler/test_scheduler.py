"""The engine with the real model: what it computes, in which order, and how generations end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from qaq.v1 import common_pb2
from transformers import DynamicCache

from qaq_core import QuantizationError, SequenceCache
from qaq_core.base.widths import WIDTHS
from qaq_core.models.loading import LoadedModel
from services.common.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from services.worker.generation import Generation
from services.worker.scheduler.scheduler import Scheduler
from services.worker.state import State
from tests.core.decisions import differing
from tests.services.worker.conftest import EXACT, Gate, MakeScheduler, outcome, request, until

Ids = Callable[[str], list[int]]
STORY = "The lighthouse keeper climbed the stairs every evening, lit the lamp and wrote the weather in his book. "
LISTS = "A list is a mutable sequence. Methods that change a list return None; sorted() returns a new list. "


def expected(smollm2: LoadedModel, tokens: list[int], new: int) -> list[int]:
    """What transformers makes of it with its own cache."""
    prompt = torch.tensor([tokens])
    with torch.no_grad():
        out = smollm2.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=DynamicCache(),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
    return out[0, len(tokens) :].tolist()


async def settled(scheduler: Scheduler, **wanted: int) -> State:
    """The engine's state, once it is as wanted."""
    await until(lambda: all(getattr(scheduler.state, name) == value for name, value in wanted.items()))
    return scheduler.state


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
    assert value("qaq_kv_bytes", tier="device") == 0


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


async def test_a_quantized_batch_decides_as_each_alone(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    """The same tokens; and row by row the same, but where a batch's other rounding tips the scale."""
    prompts = {"story": ids(STORY * 5), "lists": ids(LISTS * 6)}
    async with make_scheduler(prefix_reuse=False, requantize_wait=True) as scheduler:

        def begun(name: str, session: str) -> Generation:
            return scheduler.submit(request(prompts[name], 20, session_id=session, keep=True))

        def kept(session: str) -> SequenceCache:
            found = scheduler._sessions.cache.look(session)
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
        scheduler.cancel(waiting)
        scheduler.cancel(running)
        state = await settled(scheduler, running=0, waiting=0)
        assert (state.sessions, state.kv_bytes) == (0, 0)
        assert (await outcome(scheduler.submit(request(ids(STORY), 3, cache=EXACT)))).tokens


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
        assert await settled(scheduler, sessions=0) == State()


async def test_dropping_a_session_that_runs(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler() as scheduler:
        generation = scheduler.submit(request(ids(STORY), 5000, cache=EXACT, session_id="s", keep=True))
        await generation.replies.get()
        assert await asyncio.to_thread(lambda: (scheduler.drop("s").result(60), scheduler.state.sessions)) == (True, 0)
        with pytest.raises(FailedPrecondition, match="dropped"):
            await outcome(generation)
        await settled(scheduler, running=0, sessions=0)


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


async def test_end_of_sequence(smollm2: LoadedModel, make_scheduler: MakeScheduler) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    tokens = smollm2.tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    stop = common_pb2.StopParams(max_new_tokens=60)
    async with make_scheduler() as scheduler:
        result = await outcome(scheduler.submit(request(tokens, stop=stop, cache=EXACT)))
        assert result.done is not None
        assert result.done.reason == common_pb2.FINISH_REASON_EOS
        assert result.tokens[-1] == 2
        assert "Paris" in result.text
        assert "<|im_end|>" not in result.text
        on = common_pb2.StopParams(max_new_tokens=len(result.tokens) + 2, ignore_eos=True)
        longer = await outcome(scheduler.submit(request(tokens, stop=on, cache=EXACT)))
        assert longer.tokens[: len(result.tokens)] == result.tokens
        assert len(longer.tokens) == len(result.tokens) + 2


async def test_stop_string(smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY)
    words = smollm2.tokenizer.decode(expected(smollm2, tokens, 16))
    middle = words[len(words) // 2 : len(words) // 2 + 4]
    stop = common_pb2.StopParams(max_new_tokens=16, stop=["never there", middle], ignore_eos=True)
    async with make_scheduler() as scheduler:
        result = await outcome(scheduler.submit(request(tokens, stop=stop, cache=EXACT)))
    assert result.done is not None
    assert result.done.reason == common_pb2.FINISH_REASON_STOP
    assert result.text == words[: words.index(middle)]


async def test_context_ends_a_generation(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = ids(STORY)
    small = replace(smollm2, context_length=len(tokens) + 3)
    async with make_scheduler() as scheduler:
        monkeypatch.setattr(scheduler._check, "_loaded", small)
        result = await outcome(scheduler.submit(request(tokens, 50, cache=EXACT)))
        assert result.done is not None
        assert (len(result.tokens), result.done.reason) == (3, common_pb2.FINISH_REASON_LENGTH)
        with pytest.raises(InvalidArgument, match="shorten the prompt"):
            scheduler.submit(request([*tokens, 5, 6, 7], 1))


async def test_seed_repeats_a_generation(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async def run(scheduler: Scheduler, seed: int) -> list[int]:
        sampling = common_pb2.SamplingParams(temperature=1.5, seed=seed)
        return (await outcome(scheduler.submit(request(ids(STORY), 6, sampling=sampling, cache=EXACT)))).tokens

    async with make_scheduler() as scheduler:
        assert await run(scheduler, 1) == await run(scheduler, 1)
        assert await run(scheduler, 1) != await run(scheduler, 2)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tokens": []}, "token_ids is empty"),
        ({"tokens": [1, -1]}, "vocabulary"),
        ({"tokens": [49152]}, "vocabulary"),
        ({"tokens": [1] * 8192}, "context of 8192"),
        ({"tokens": [1], "new": 0}, "max_new_tokens"),
        ({"tokens": [1], "sampling": common_pb2.SamplingParams(temperature=-1)}, "temperature"),
        ({"tokens": [1], "stop": common_pb2.StopParams(max_new_tokens=1, stop=[""])}, "empty string"),
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
        with pytest.raises(ValueError, match=r"preset|target"):
            await outcome(scheduler.submit(request(ids(STORY), cache=common_pb2.CacheParams(**cache))))
        assert (await outcome(scheduler.submit(request(ids(STORY), 1, cache=EXACT)))).tokens


async def test_budget_costs_idle_sessions_first(make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY * 4)
    budget = int((len(tokens) + 36) * 30 * 2 * 3 * 64 * 2 * 1.1)
    async with make_scheduler(kv_budget_bytes=budget) as scheduler:
        await outcome(scheduler.submit(request(tokens, 1, cache=EXACT, session_id="old", keep=True)))
        assert scheduler.state.sessions == 1
        await outcome(scheduler.submit(request(tokens, 1, cache=EXACT, session_id="new", keep=True)))
        assert not await asyncio.wrap_future(scheduler.drop("old"))
        assert await asyncio.wrap_future(scheduler.drop("new"))
        with pytest.raises(ResourceExhausted, match="QAQ_KV_BUDGET_BYTES"):
            await outcome(scheduler.submit(request(tokens * 2, 1, cache=EXACT)))
        assert (await outcome(scheduler.submit(request(tokens * 2, 1)))).tokens  # in fewer bits it fits


async def test_stopping_ends_everything(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler(max_sequences=1) as scheduler:
        generations = [scheduler.submit(request(ids(STORY), 5000, cache=EXACT)) for _ in range(2)]
        await generations[0].replies.get()
    for generation in generations:
        with pytest.raises(Unavailable, match="again"):
            await outcome(generation)
    with pytest.raises(Unavailable):
        scheduler.submit(request(ids(STORY)))
    assert scheduler.state == State()
