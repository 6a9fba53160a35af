"""What a request may ask of a generation, with the real model: likelihoods, choices, stops, going on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from qaq.v1 import common_pb2, worker_pb2
from qaq.v1.common_pb2 import OutputParams, SamplingParams, StopParams

from qaq_core.models import LoadedModel
from services.common.errors import InvalidArgument
from services.worker.generation import Generation
from services.worker.scheduler.scheduler import Scheduler
from tests.services.worker.conftest import EXACT, Gate, MakeScheduler, Outcome, outcome, request

Ids = Callable[[str], list[int]]
STORY = "The lighthouse keeper climbed the stairs every evening, lit the lamp and wrote the weather in his book. "
SAMPLED = SamplingParams(temperature=1.5, seed=11)


@torch.no_grad()
def likelihoods(smollm2: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] of what follows each token, by transformers alone."""
    return smollm2.model(torch.tensor([tokens])).logits[0].log_softmax(-1)


async def messages(generation: Generation, choices: int = 1) -> list[worker_pb2.RunReply]:
    """All that came, up to the last choice's end."""
    replies = []
    while choices:
        reply = await generation.replies.get()
        if isinstance(reply, Exception):
            raise reply
        replies.append(reply)
        choices -= reply.HasField("finished")
    return replies


async def by_choice(
    scheduler: Scheduler, choices: int, tokens: list[int], new: int = 8, **fields: Any
) -> list[Outcome]:
    """What came of each choice of a request."""
    outcomes = [Outcome() for _ in range(choices)]
    asked = request(tokens, new, choices=choices, **fields)
    for reply in await messages(scheduler.submit(asked), choices):
        match reply.WhichOneof("event"):
            case "token":
                outcomes[reply.token.choice].tokens.append(reply.token.token_id)
                outcomes[reply.token.choice].text += reply.token.text
            case "finished":
                outcomes[reply.finished.choice].done = reply.finished
                outcomes[reply.finished.choice].text += reply.finished.text
    return outcomes


async def test_likelihoods_of_prompt_and_answer(smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY)
    asked = OutputParams(logprobs=True, top_logprobs=3, echo=True)
    async with make_scheduler(prefill_chunk=7) as scheduler:
        # A penalty changes the choice, but not what the model itself thought.
        sampling = SamplingParams(temperature=0, repetition_penalty=1.3)
        replies = await messages(scheduler.submit(request(tokens, 5, output=asked, cache=EXACT, sampling=sampling)))
    prompt = [info for reply in replies for info in reply.prompt.tokens]
    answer = [reply.token.info for reply in replies if reply.HasField("token")]
    assert [info.token_id for info in prompt] == tokens
    assert "".join(info.text for info in prompt) == STORY
    assert not prompt[0].HasField("logprob")
    everything = [info.token_id for info in (*prompt, *answer)]
    expected = likelihoods(smollm2, everything)
    for place, info in enumerate([*prompt, *answer][1:]):
        assert info.logprob == pytest.approx(float(expected[place, info.token_id]), abs=2e-2)
        values, best = expected[place].topk(3)
        assert info.top[0].token_id == int(best[0]) or float(values[0] - values[1]) < 2e-2
        assert [near.logprob for near in info.top] == pytest.approx(values.tolist(), abs=2e-2)
    assert any(info.token_id != info.top[0].token_id for info in answer), "the penalty chose nothing else"


async def test_echo_of_a_later_turn_is_that_turns_prompt(make_scheduler: MakeScheduler, ids: Ids) -> None:
    log, more = ids(STORY), ids("Then the storm came.")
    asked = OutputParams(logprobs=True, echo=True)
    async with make_scheduler() as scheduler:
        first = await outcome(scheduler.submit(request(log, 4, session_id="s", keep=True, cache=EXACT)))
        log += first.tokens
        later = request([*log, *more], 2, session_id="s", keep=True, cache=EXACT, output=asked, history_tokens=len(log))
        replies = await messages(scheduler.submit(later))
    echoed = [info for reply in replies for info in reply.prompt.tokens]
    assert [info.token_id for info in echoed] == more
    assert all(info.HasField("logprob") for info in echoed)
    assert [reply.prefill.tokens_total for reply in replies if reply.HasField("prefill")] == [len(log) + len(more)]


async def test_echo_without_likelihoods(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler(prefill_chunk=8) as scheduler:
        replies = await messages(scheduler.submit(request(ids(STORY), 1, output=OutputParams(echo=True))))
    assert replies[0].WhichOneof("event") == "prompt"
    assert [info.token_id for info in replies[0].prompt.tokens] == ids(STORY)
    assert not any(info.HasField("logprob") for info in replies[0].prompt.tokens)
    assert not any(reply.token.HasField("info") for reply in replies)


async def test_choices_share_one_prompt(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    tokens = ids(STORY * 3)
    gate.open()
    async with make_scheduler() as scheduler:
        alone = await outcome(scheduler.submit(request(tokens, 12, sampling=SAMPLED)))
        gate.batches.clear()
        several = await by_choice(scheduler, 3, tokens, 12, sampling=SAMPLED)
        assert gate.batches == [(1, len(tokens))] + [(3, 1)] * 11
        assert scheduler.state.kv_bytes == scheduler.state.running == 0
        greedy = await by_choice(scheduler, 2, tokens, 12)
        assert greedy[0].tokens == greedy[1].tokens == (await outcome(scheduler.submit(request(tokens, 12)))).tokens
    assert several[0].tokens == alone.tokens
    assert len({tuple(choice.tokens) for choice in several}) == 3
    for choice in several:
        assert choice.done is not None
        assert (choice.done.usage.prompt_tokens, choice.done.usage.generated_tokens) == (len(tokens), 12)


async def test_memory_of_choices_is_counted(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    tokens, seen = ids(STORY * 4), []
    async with make_scheduler() as scheduler:
        for choices in (1, 4):
            gate.open()
            generation = scheduler.submit(request(tokens, 40, choices=choices))
            for _ in range(2 * choices):  # at the first token of each the prompt may not be packed yet
                while (await generation.replies.get()).WhichOneof("event") != "token":
                    pass
            gate.shut()
            while len(scheduler.batch.running) != choices:
                await generation.replies.get()
            seen.append(scheduler.state.kv_bytes)
            scheduler.cancel(generation.call)
            gate.open()
            while scheduler.state.running:
                await outcome(scheduler.submit(request(tokens[:4], 1)))
    assert seen[1] == pytest.approx(4 * seen[0], rel=0.2)


async def test_choices_wait_for_room_and_have_their_limits(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    async with make_scheduler(max_sequences=3) as scheduler:
        first = scheduler.submit(request(ids(STORY), 3))
        second = scheduler.submit(request(ids(STORY), 3, choices=3))
        gate.open()
        await outcome(first)
        await messages(second, 3)
        assert max(batch for batch, _ in gate.batches) == 3
        assert (3, 1) in gate.batches
        assert (4, 1) not in gate.batches
        with pytest.raises(InvalidArgument, match="at most 3"):
            scheduler.submit(request(ids(STORY), 3, choices=4))
        with pytest.raises(InvalidArgument, match="continues with one choice"):
            scheduler.submit(request(ids(STORY), 3, choices=2, session_id="s", keep=True))


async def test_a_cancelled_call_frees_all_choices(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler() as scheduler:
        generation = scheduler.submit(request(ids(STORY), 4000, choices=3))
        while (await generation.replies.get()).WhichOneof("event") != "token":
            pass
        scheduler.cancel(generation.call)
        while scheduler.state.running:
            await outcome(scheduler.submit(request(ids("x"), 1)))
        assert scheduler.state.kv_bytes == 0


async def test_what_ended_it_is_told(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler() as scheduler:
        free = await outcome(scheduler.submit(request(ids(STORY), 12)))
        assert free.done is not None
        assert free.done.WhichOneof("found") is None
        token = free.tokens[5]
        first = free.tokens.index(token)
        stopped = await outcome(scheduler.submit(request(ids(STORY), stop=StopParams(stop_token_ids=[token]))))
        assert stopped.done is not None
        assert (stopped.done.reason, stopped.done.stop_token_id) == (common_pb2.FINISH_REASON_STOP, token)
        assert stopped.tokens == free.tokens[: first + 1]
        assert free.text.startswith(stopped.text)
        assert len(stopped.text) < len(free.text)
        word = free.text.split()[2]
        found = await outcome(scheduler.submit(request(ids(STORY), stop=StopParams(max_new_tokens=12, stop=[word]))))
        assert found.done is not None
        assert (found.done.reason, found.done.stop_string) == (common_pb2.FINISH_REASON_STOP, word)
        assert found.text == free.text[: free.text.index(word)]


@pytest.mark.parametrize("at", [1, 7])
async def test_goes_on_where_another_worker_stopped(make_scheduler: MakeScheduler, ids: Ids, at: int) -> None:
    tokens = ids(STORY)
    fields: dict[str, Any] = {
        "sampling": SamplingParams(temperature=1.2, seed=5, frequency_penalty=0.5, presence_penalty=0.5),
        "stop": StopParams(max_new_tokens=16, ignore_eos=True, stop=["zebra"]),
        "cache": EXACT,
    }
    async with make_scheduler() as scheduler:
        whole = await outcome(scheduler.submit(request(tokens, **fields)))
    async with make_scheduler() as scheduler:
        log = [*tokens, *whole.tokens[:at]]
        rest = await outcome(scheduler.submit(request(log, generated_tokens=at, **fields)))
        assert rest.tokens == whole.tokens[at:]
        assert whole.text.endswith(rest.text)
        assert rest.done is not None
        assert (rest.done.usage.prompt_tokens, rest.done.usage.generated_tokens) == (len(tokens), 16)
        over = await outcome(scheduler.submit(request([*tokens, *whole.tokens], generated_tokens=16, **fields)))
        assert over.tokens == []
        assert over.done is not None
        assert over.done.reason == common_pb2.FINISH_REASON_LENGTH


async def test_a_branch_copies_its_origins_cache(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    gate.open()
    async with make_scheduler() as scheduler:
        first = await outcome(scheduler.submit(request(ids(STORY * 2), 4, session_id="s", keep=True)))
        log = [*ids(STORY * 2), *first.tokens]
        question = ids("Who wrote it down?")
        gate.batches.clear()
        branched = request([*log, *question], 6, session_id="t", keep=True, branch_of="s")
        branch = await outcome(scheduler.submit(branched))
        assert gate.batches[0] == (1, len(question) + 1)
        assert scheduler.state.sessions == 2
        gate.batches.clear()
        origin = await outcome(scheduler.submit(request([*log, *question], 6, session_id="s", keep=True)))
        assert gate.batches[0] == (1, len(question) + 1)
    assert branch.tokens == origin.tokens


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"stop": StopParams(stop_token_ids=[49152])}, "stop.stop_token_ids names token 49152"),
        ({"sampling": SamplingParams(logit_bias={-1: 1})}, "sampling.logit_bias names token -1"),
        ({"stop": StopParams(max_new_tokens=0)}, "max_new_tokens is 0"),
        ({"history_tokens": 3}, "history_tokens is 3"),
        ({"generated_tokens": -1}, "generated_tokens is -1"),
        ({"output": OutputParams(logprobs=True, top_logprobs=-1)}, "top_logprobs is -1"),
    ],
)
async def test_refused_before_the_queue(make_scheduler: MakeScheduler, fields: dict[str, Any], sentence: str) -> None:
    async with make_scheduler() as scheduler:
        with pytest.raises(InvalidArgument, match=sentence):
            scheduler.submit(request([1, 2, 3], **fields))
