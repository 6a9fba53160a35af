"""Constraints with the real model: what each kind makes of a hot sample, and where the state goes."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any

import jsonschema
import pytest
import torch
from qaq.v1 import common_pb2
from qaq.v1.common_pb2 import Constraint, OutputParams, SamplingParams, StopParams

from qaq_core.models import LoadedModel
from services.common.errors import FailedPrecondition, InvalidArgument
from services.worker.constraints import GrammarMask, Grammars
from services.worker.scheduler.scheduler import Scheduler
from tests.services.worker.conftest import EXACT, Gate, Ids, MakeScheduler, Outcome, outcome, request

ASK = "Describe a person in a few words, please: "
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["tall", "old", "kind"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LINES = 'root ::= line line line?\nline ::= [a-z]{1,5} " = " [0-9]{1,3} "\\n"'
NUMBER = r"(\+|-)?[0-9]{1,4}(\.[0-9]{1,3})?"
WORDS = ["yes", "no", "it depends", 'a "quoted" \\ text\n', "日本"]
CALL = {
    "type": "tag",
    "begin": "<call>",
    "content": {"type": "json_schema", "json_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    "end": "</call>",
}
TAG = {"type": "structural_tag", "format": {"type": "tags_with_separator", "tags": [CALL], "separator": ",",
       "at_least_one": True, "stop_after_first": True}}  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(whole_smollm2: LoadedModel) -> LoadedModel:
    """The whole model: its first layers alone fill a text with whitespace, and many never end."""
    return whole_smollm2


def schema(of: Any) -> Constraint:
    return Constraint(json_schema=json.dumps(of))


def hot(seed: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=1, top_p=1, top_k=0, seed=seed, **more)


async def answer(scheduler: Scheduler, tokens: list[int], constraint: Constraint, **fields: Any) -> Outcome:
    """What comes of a request with a constraint."""
    fields.setdefault("stop", StopParams(max_new_tokens=120))
    asked = request(tokens, constraint=constraint, **fields)
    grammar = await scheduler.grammars.get(asked.constraint)
    return await outcome(scheduler.submit(asked, grammar))


def is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


def is_call(text: str) -> bool:
    found = re.fullmatch(r"<call>(.*)</call>", text, re.DOTALL)
    return found is not None and isinstance(json.loads(found[1]), dict)


KINDS = {
    "json_schema": (schema(PERSON), is_person),
    "json_object": (Constraint(json_object=True), lambda text: isinstance(json.loads(text), dict)),
    "regex": (Constraint(regex=NUMBER), re.compile(NUMBER).fullmatch),
    "grammar": (Constraint(grammar=LINES), re.compile(r"([a-z]{1,5} = [0-9]{1,3}\n){2,3}").fullmatch),
    "choice": (Constraint(choice=Constraint.Choice(texts=WORDS)), lambda text: text in WORDS),
    "structural_tag": (Constraint(structural_tag=json.dumps(TAG)), is_call),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_hot_sample_is_what_was_asked_for(make_scheduler: MakeScheduler, ids: Ids, kind: str) -> None:
    constraint, fits = KINDS[kind]
    async with make_scheduler() as scheduler:
        grammar = await scheduler.grammars.get(constraint)
        fields = {"stop": StopParams(max_new_tokens=120), "constraint": constraint}
        bias = {ids("}")[0]: 100.0, ids('"')[0]: 100.0} if kind == "json_object" else {}  # or it may never end
        running = [
            scheduler.submit(request(ids(ASK), sampling=hot(seed, logit_bias=bias), **fields), grammar)
            for seed in range(3)
        ]
        done = await asyncio.gather(*map(outcome, running))
    for each in done:
        assert each.done is not None
        assert each.done.reason == common_pb2.FINISH_REASON_EOS
        assert fits(each.text), each.text


async def test_eight_schemas_at_once_and_one_text_without(make_scheduler: MakeScheduler, ids: Ids, gate: Gate) -> None:
    async with make_scheduler(max_sequences=9) as scheduler:
        running = []
        for place in range(8):
            constraint = schema({"type": "object", "properties": {f"key{place}": {"enum": [place, str(place)]}},
                                 "required": [f"key{place}"]})  # fmt: skip
            asked = request(ids(ASK), sampling=hot(place), constraint=constraint, stop=StopParams(max_new_tokens=100))
            running.append(scheduler.submit(asked, await scheduler.grammars.get(constraint)))
        free = scheduler.submit(request(ids(ASK), 12))
        gate.open()
        done = await asyncio.gather(*map(outcome, running))
        assert (9, 1) in gate.batches
        assert (await outcome(free)).tokens == (await outcome(scheduler.submit(request(ids(ASK), 12)))).tokens
    for place, each in enumerate(done):
        assert json.loads(each.text) in ({f"key{place}": place}, {f"key{place}": str(place)})


async def test_choices_differ_and_all_fit(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler() as scheduler:
        constraint = schema(PERSON)
        asked = request(
            ids(ASK), choices=3, constraint=constraint, sampling=hot(5), stop=StopParams(max_new_tokens=120)
        )
        generation = scheduler.submit(asked, await scheduler.grammars.get(constraint))
        texts, ends = [""] * 3, 0
        while ends < 3:
            reply = await generation.replies.get()
            assert not isinstance(reply, Exception), reply
            if reply.HasField("token"):
                texts[reply.token.choice] += reply.token.text
            if reply.HasField("finished"):
                texts[reply.finished.choice] += reply.finished.text
                ends += 1
    assert all(map(is_person, texts))
    assert len(set(texts)) > 1


@pytest.mark.parametrize("at", [1, 9])
async def test_goes_on_where_another_worker_stopped(make_scheduler: MakeScheduler, ids: Ids, at: int) -> None:
    fields: dict[str, Any] = {"sampling": hot(3), "cache": EXACT}
    async with make_scheduler() as scheduler:
        whole = await answer(scheduler, ids(ASK), schema(PERSON), **fields)
    async with make_scheduler() as scheduler:
        log = [*ids(ASK), *whole.tokens[:at]]
        rest = await answer(scheduler, log, schema(PERSON), generated_tokens=at, **fields)
        assert rest.tokens == whole.tokens[at:]
        over = await answer(
            scheduler, [*ids(ASK), *whole.tokens], schema(PERSON), generated_tokens=len(whole.tokens), **fields
        )
        assert over.tokens == []
        assert over.done is not None
        assert over.done.reason == common_pb2.FINISH_REASON_EOS
        with pytest.raises(InvalidArgument, match="does not fit the constraint"):
            await answer(scheduler, ids(ASK), schema(PERSON), generated_tokens=2)
    assert is_person(whole.text)


async def test_a_cancelled_call_ends(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler() as scheduler:
        asked = request(ids(ASK), constraint=Constraint(regex="[a-z ]*"), stop=StopParams(max_new_tokens=4000))
        generation = scheduler.submit(asked, await scheduler.grammars.get(asked.constraint))
        while (await generation.replies.get()).WhichOneof("event") != "token":
            pass
        scheduler.cancel(generation.call)
        while scheduler.state.running:
            await outcome(scheduler.submit(request(ids("x"), 1)))
        assert scheduler.state.kv_bytes == 0


async def test_with_penalties_bias_and_filters(make_scheduler: MakeScheduler, ids: Ids, smollm2: LoadedModel) -> None:
    """Bias cannot lead out of the grammar, and filters see what the grammar leaves."""
    no, eos = ids("no")[0], smollm2.eos_token_ids[0]
    words = Constraint(choice=Constraint.Choice(texts=["yes", "no"]))
    async with make_scheduler() as scheduler:
        for bias in ({no: 100.0}, {no: 100.0, eos: 100.0, ids("zebra")[0]: 100.0}):
            sampling = hot(1, logit_bias=bias, frequency_penalty=2, presence_penalty=2, repetition_penalty=1.5)
            assert (await answer(scheduler, ids(ASK), words, sampling=sampling)).text == "no"
        for seed in range(4):
            narrow = SamplingParams(temperature=1, top_k=1, min_p=0.9, seed=seed)
            assert (await answer(scheduler, ids(ASK), words, sampling=narrow)).text in ("yes", "no")


async def test_with_lengths(make_scheduler: MakeScheduler, ids: Ids) -> None:
    """A text that is complete ends before its minimum length; a scored prompt needs no text at all."""
    word = Constraint(choice=Constraint.Choice(texts=["yes"]))
    async with make_scheduler() as scheduler:
        done = await answer(scheduler, ids(ASK), word, stop=StopParams(max_new_tokens=40, min_new_tokens=30))
        assert done.done is not None
        assert (done.text, done.done.reason) == ("yes", common_pb2.FINISH_REASON_EOS)
        longer = Constraint(regex="[a-z]+")
        done = await answer(
            scheduler, ids(ASK), longer, sampling=hot(2), stop=StopParams(max_new_tokens=40, min_new_tokens=30)
        )
        assert len(done.tokens) >= 30
        scored = await answer(
            scheduler, ids(ASK), word, stop=StopParams(max_new_tokens=0), output=OutputParams(echo=True, logprobs=True)
        )
        assert scored.done is not None
        assert (scored.tokens, scored.text, scored.done.reason) == ([], "", common_pb2.FINISH_REASON_LENGTH)


async def test_likelihoods_are_the_models_own(make_scheduler: MakeScheduler, ids: Ids, smollm2: LoadedModel) -> None:
    tokens = ids(ASK)
    async with make_scheduler() as scheduler:
        asked = request(tokens, constraint=Constraint(regex="zq[0-9]{3}"), cache=EXACT, sampling=hot(1),
                        output=OutputParams(logprobs=True), stop=StopParams(max_new_tokens=20))  # fmt: skip
        generation = scheduler.submit(asked, await scheduler.grammars.get(asked.constraint))
        infos = []
        while not (reply := await generation.replies.get()).HasField("finished"):
            infos += [reply.token.info] if reply.HasField("token") else []
    log = [*tokens, *(info.token_id for info in infos)]
    with torch.no_grad():
        expected = smollm2.model(torch.tensor([log])).logits[0].log_softmax(-1)
    for place, info in enumerate(infos, start=len(tokens) - 1):
        assert info.logprob == pytest.approx(float(expected[place, info.token_id]), abs=2e-2)


async def test_stop_strings_end_a_constrained_text(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler() as scheduler:
        done = await answer(
            scheduler,
            ids(ASK),
            Constraint(regex="[a-c]{4}xyz[a-c]{9}"),
            stop=StopParams(max_new_tokens=60, stop=["xy"]),
        )
    assert re.fullmatch("[a-c]{4}", done.text)
    assert done.done is not None
    assert done.done.stop_string == "xy"


async def test_special_tokens_do_not_occur_in_strings(smollm2: LoadedModel, make_scheduler: MakeScheduler) -> None:
    """In a JSON text the mark of a turn cannot be sampled, though its letters fit a string."""
    mark = smollm2.tokenizer.convert_tokens_to_ids("<|im_start|>")
    async with make_scheduler() as scheduler:
        grammar = await scheduler.grammars.get(schema({"type": "string"}))
    mask = GrammarMask(grammar, smollm2.eos_token_ids, 49152)
    for token in smollm2.tokenizer.encode('"a'):
        mask.accept(token)
    masked = mask(torch.tensor([[]]), torch.zeros(1, 49152))[0]
    assert masked[mark] == -torch.inf
    assert masked[smollm2.eos_token_ids[0]] == -torch.inf
    assert masked[smollm2.tokenizer.encode("b")[0]] == 0


@pytest.mark.parametrize("constraint", [Constraint(regex=r"[^\s\S]"), Constraint(grammar="root ::= root")])
async def test_a_constraint_that_no_text_fits_is_refused(
    make_scheduler: MakeScheduler, ids: Ids, constraint: Constraint
) -> None:
    async with make_scheduler() as scheduler:
        with pytest.raises(InvalidArgument, match="no text fits the constraint"):
            await answer(scheduler, ids(ASK), constraint)


async def test_a_constraint_that_takes_too_long_to_follow_ends(
    make_scheduler: MakeScheduler, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sequences of the batch wait for a mask."""
    monkeypatch.setattr("services.worker.constraints.MASK_GRACE_S", -1.0)
    monkeypatch.setattr("services.worker.constraints.MASK_S", 0.25)
    async with make_scheduler() as scheduler:
        with pytest.raises(InvalidArgument, match="takes too long to follow"):
            await answer(scheduler, ids(ASK), Constraint(regex="[a-z ]{100}"))


async def test_a_complete_text_ends_whatever_else_forbids_it(
    smollm2: LoadedModel, make_scheduler: MakeScheduler
) -> None:
    eos = smollm2.eos_token_ids[0]
    async with make_scheduler() as scheduler:
        grammar = await scheduler.grammars.get(Constraint(regex="a"))
    mask = GrammarMask(grammar, [eos], 49152)
    mask.accept(smollm2.tokenizer.encode("a")[0])
    scores = torch.zeros(1, 49152)
    scores[0, eos] = -torch.inf
    masked = mask(torch.tensor([[]]), scores)
    assert int(masked.argmax()) == eos
    assert int((masked > -torch.inf).sum()) == 1


@pytest.mark.parametrize(
    ("constraint", "sentence"),
    [
        (schema({"type": "strange"}), 'constraint.json_schema cannot be compiled: Unsupported type "strange"'),
        (Constraint(json_schema="{"), "constraint.json_schema is not JSON"),
        (schema({"properties": {"a": {"uniqueItems": True}}}), "#/properties/a: uniqueItems cannot be enforced"),
        (Constraint(regex="("), "constraint.regex cannot be compiled: .*parenthesis is not closed"),
        (Constraint(regex=r"(a)\1"), "Backreference is not supported"),
        (Constraint(grammar='root ::= x "a"'), 'constraint.grammar cannot be compiled: .*"x" is not defined'),
        (Constraint(structural_tag="{}"), "constraint.structural_tag cannot be compiled: .*must have a format"),
    ],
)
async def test_what_cannot_be_compiled_is_told(
    make_scheduler: MakeScheduler, constraint: Constraint, sentence: str
) -> None:
    async with make_scheduler() as scheduler:
        with pytest.raises(InvalidArgument, match=sentence):
            await scheduler.grammars.get(constraint)


async def test_ignore_eos_is_refused(make_scheduler: MakeScheduler, ids: Ids) -> None:
    async with make_scheduler() as scheduler:
        with pytest.raises(InvalidArgument, match="leave ignore_eos unset"):
            await answer(scheduler, ids(ASK), Constraint(regex="a"), stop=StopParams(ignore_eos=True, max_new_tokens=4))


async def test_without_xgrammar_it_says_what_to_install(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)  # type: ignore[arg-type]  # Python's mark of a missing module
    grammars = Grammars(smollm2, 49152)
    grammars.prepare()
    with pytest.raises(FailedPrecondition, match=re.escape("pip install 'qaq-kv[constraints]'")):
        await grammars.get(Constraint(json_object=True))
    assert await grammars.get(Constraint()) is None


async def test_a_model_without_an_end_is_refused(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadedModel, "eos_token_ids", ())
    with pytest.raises(FailedPrecondition, match="no end-of-sequence token"):
        await Grammars(smollm2, 49152).get(Constraint(json_object=True))
