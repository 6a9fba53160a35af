"""Prompts and turns of one token, and calls that generate none: they are prompts like all others."""

from __future__ import annotations

import pytest
from qaq.v1 import common_pb2, worker_pb2
from qaq.v1.common_pb2 import OutputParams, SamplingParams, StopParams

from qaq_core import InProcessOriginals
from qaq_core.models import LoadedModel
from services.common.errors import InvalidArgument
from services.worker.generation import Generation
from services.worker.scheduler.scheduler import Scheduler
from services.worker.session import Session
from tests.services.worker.conftest import EXACT, Ids, MakeScheduler, expected, outcome, request, settled
from tests.services.worker.test_parameters import STORY, by_choice, likelihoods, messages

SAMPLED = SamplingParams(temperature=1.5, seed=11)
SCORED = OutputParams(logprobs=True, top_logprobs=1, echo=True)


def prompt_of(replies: list[worker_pb2.RunReply]) -> list[common_pb2.TokenInfo]:
    return [info for reply in replies for info in reply.prompt.tokens]


async def test_one_token_has_several_choices(smollm2: LoadedModel, make_scheduler: MakeScheduler) -> None:
    async with make_scheduler() as scheduler:
        several = await by_choice(scheduler, 8, [504], 6, sampling=SAMPLED, cache=EXACT)
        alone = await outcome(scheduler.submit(request([504], 6, sampling=SAMPLED, cache=EXACT)))
        greedy = await by_choice(scheduler, 2, [504], 6, cache=EXACT)
        assert scheduler.state.running == scheduler.state.kv_bytes == 0
    assert all(choice.done is not None and len(choice.tokens) == 6 for choice in several)
    assert several[0].tokens == alone.tokens
    assert len({tuple(choice.tokens) for choice in several}) > 4
    assert [choice.tokens for choice in greedy] == [expected(smollm2, [504], 6)] * 2


async def test_choices_of_which_a_copy_fails_leave_nothing(
    make_scheduler: MakeScheduler, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = InProcessOriginals(), 0
    fork = Session.fork

    def fail_at_the_third(session: Session) -> Session:
        nonlocal made
        made += 1
        if made == 3:
            raise MemoryError("no more")
        return fork(session)

    async with make_scheduler(store) as scheduler:
        monkeypatch.setattr(Session, "fork", fail_at_the_third)
        with pytest.raises(MemoryError):
            await outcome(scheduler.submit(request(ids(STORY) * 2, 6, cache=EXACT, choices=4)))
        await settled(scheduler, running=0, kv_bytes=0)
    assert made == 3
    assert store.nbytes == 0


@pytest.mark.parametrize("preset", ["fp16", "balanced"])
async def test_one_token_is_echoed_and_reported(make_scheduler: MakeScheduler, preset: str) -> None:
    cache = common_pb2.CacheParams(preset=preset)
    async with make_scheduler() as scheduler:
        replies = await messages(scheduler.submit(request([504], 3, output=SCORED, cache=cache, choices=2)), 2)
    assert [(info.token_id, info.HasField("logprob")) for info in prompt_of(replies)] == [(504, False)]
    assert [reply.prefill.tokens_total for reply in replies if reply.HasField("prefill")] == [1]
    assert sum(reply.HasField("token") for reply in replies) == 6


async def test_a_turn_of_one_token(smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids) -> None:
    log = ids(STORY)

    async def turn(scheduler: Scheduler, more: list[int], new: int) -> list[worker_pb2.RunReply]:
        stop = StopParams(max_new_tokens=new, ignore_eos=True)
        history = len(log)
        log.extend(more)
        fields = {"session_id": "s", "keep": True, "cache": EXACT, "output": SCORED, "history_tokens": history}
        replies = await messages(scheduler.submit(request(log, stop=stop, **fields)))
        log.extend(reply.token.token_id for reply in replies if reply.HasField("token"))
        return replies

    async with make_scheduler() as scheduler:
        await outcome(scheduler.submit(request(log, 1, session_id="s", keep=True, cache=EXACT)))
        for token, new in ((504, 0), (282, 2), (253, 0), (504, 1)):
            replies = await turn(scheduler, [token], new)
            (told,) = prompt_of(replies)
            place = len(log) - new - 1
            assert told.token_id == token
            assert told.logprob == pytest.approx(float(likelihoods(smollm2, log)[place - 1, token]), abs=2e-2)
            assert replies[-1].finished.usage.generated_tokens == new
            assert replies[-1].finished.reason == common_pb2.FINISH_REASON_LENGTH


async def test_scoring_generates_nothing(smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY)
    asked = OutputParams(prompt_logprobs=2)
    async with make_scheduler(prefill_chunk=7) as scheduler:
        none = request(tokens, stop=StopParams(max_new_tokens=0), output=asked, cache=EXACT)
        replies = await messages(scheduler.submit(none))
        context = smollm2.context_length
        with pytest.raises(InvalidArgument, match=f"has room for {context}"):
            scheduler.submit(request([1] * (context + 1), stop=StopParams(max_new_tokens=0), output=asked))
    told = prompt_of(replies)
    assert [info.token_id for info in told] == tokens
    assert not any(reply.HasField("token") for reply in replies)
    assert (told[0].rank, list(told[0].top)) == (0, [])
    scores = likelihoods(smollm2, tokens)
    for place, info in enumerate(told[1:]):
        assert info.logprob == pytest.approx(float(scores[place, info.token_id]), abs=2e-2)
        assert len(info.top) == 2
        if info.token_id in (near.token_id for near in info.top):
            assert info.top[info.rank - 1].token_id == info.token_id
        else:
            assert info.rank > 2
    assert any(info.rank > 2 for info in told)


@pytest.mark.parametrize(
    ("stop", "sentence"),
    [
        (StopParams(max_new_tokens=0), "max_new_tokens is 0; send at least 1"),
        (StopParams(max_new_tokens=-1), "max_new_tokens is -1"),
        (StopParams(max_new_tokens=3, min_new_tokens=4), "min_new_tokens is 4"),
        (StopParams(min_new_tokens=-1), "min_new_tokens is -1"),
    ],
)
async def test_lengths_that_are_refused(make_scheduler: MakeScheduler, stop: StopParams, sentence: str) -> None:
    async with make_scheduler() as scheduler:
        with pytest.raises(InvalidArgument, match=sentence):
            scheduler.submit(request([1, 2], stop=stop))


async def test_an_answer_has_its_least_length(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async def asked(scheduler: Scheduler, **stop: object) -> Generation:
        return scheduler.submit(request(ids(STORY), stop=StopParams(max_new_tokens=12, **stop), cache=EXACT))

    async with make_scheduler() as scheduler:
        free = await outcome(await asked(scheduler, ignore_eos=True))
        first = free.tokens[0]
        assert len((await outcome(await asked(scheduler, stop_token_ids=[first]))).tokens) == 1
        longer = await outcome(await asked(scheduler, stop_token_ids=[first], min_new_tokens=5))
        assert len(longer.tokens) >= 5
        assert first not in longer.tokens[:4]
        word = free.text.split()[0]
        later = await outcome(await asked(scheduler, stop=[word], min_new_tokens=6))
        assert later.text.startswith(free.text[: len(word) + 1])
        included = await outcome(await asked(scheduler, stop=[word], include_stop_string=True))
        assert included.text == free.text[: free.text.index(word) + len(word)]
        assert included.done is not None
        assert included.done.stop_string == word


async def test_kept_tokens_are_counted(make_scheduler: MakeScheduler, ids: Ids) -> None:
    log = ids(STORY)
    async with make_scheduler() as scheduler:
        first = await outcome(scheduler.submit(request(log, 4, session_id="s", keep=True)))
        log += first.tokens
        later = await outcome(
            scheduler.submit(request([*log, 504], 2, session_id="s", keep=True, history_tokens=len(log)))
        )
    assert first.done is not None
    assert later.done is not None
    assert (first.done.usage.kept_tokens, later.done.usage.kept_tokens) == (0, len(log) - 1)


async def test_logits_stay_finite(make_scheduler: MakeScheduler, ids: Ids) -> None:
    """Values that would leave float32's range are greedy decoding, or are refused."""
    async with make_scheduler() as scheduler:
        greedy = (await outcome(scheduler.submit(request(ids(STORY), 6)))).tokens
        for sampling in (
            SamplingParams(temperature=2e-38),
            SamplingParams(temperature=1e-45),
            SamplingParams(temperature=1, top_p=0),
            SamplingParams(temperature=1, top_p=1e-38),
        ):
            assert (await outcome(scheduler.submit(request(ids(STORY), 6, sampling=sampling)))).tokens == greedy
        for penalty in (0.01, 100):
            extreme = SamplingParams(temperature=1e-5, repetition_penalty=penalty, logit_bias={5: 100}, seed=1)
            assert len((await outcome(scheduler.submit(request(ids(STORY), 6, sampling=extreme)))).tokens) == 6
        for penalty in (1e-38, 0, 1e38, -1):
            with pytest.raises(InvalidArgument, match="repetition_penalty is"):
                scheduler.submit(request([1, 2], sampling=SamplingParams(repetition_penalty=penalty)))


@pytest.mark.parametrize("target", ["target_bits", "target_error"])
async def test_targets_near_zero(make_scheduler: MakeScheduler, ids: Ids, target: str) -> None:
    cache = common_pb2.CacheParams(preset="balanced", **{target: 1e-38})
    async with make_scheduler() as scheduler:
        assert len((await outcome(scheduler.submit(request(ids(STORY * 3), 12, cache=cache)))).tokens) == 12
