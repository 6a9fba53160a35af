"""Several models through one router: by name, each with its own workers, queue, tokenizer and sessions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from qaq.v1 import generate_pb2
from redis.asyncio import Redis

from qaq_core.models import load_tokenizer
from services.common.settings import RouterSettings
from services.router import model, models

from .conftest import CountingWorker, running_router, running_worker
from .test_service import Code, Stub, replies, request, until
from .test_waiting import until_waiting

Get, List = generate_pb2.GetModelRequest, generate_pb2.ListModelsRequest
Open = generate_pb2.OpenSessionRequest


@pytest.fixture(scope="module")
def marked(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of its own: its prompts begin with one more token."""
    path = tmp_path_factory.mktemp("models") / "marked"
    tokenizer = load_tokenizer(str(model_path))
    tokenizer.chat_template = "<|im_end|>{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(path)


@pytest.fixture
async def other(redis: Redis, marked: str) -> AsyncIterator[CountingWorker]:
    """A worker of a second model."""
    async with running_worker(redis, name="marked", source=marked, context=64) as worker:
        yield worker


@pytest.fixture
async def both(worker: CountingWorker, other: CountingWorker, router_settings: RouterSettings) -> AsyncIterator[Stub]:
    """A client of a router in front of both."""
    async with running_router(router_settings) as client:
        yield client


async def refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def serves(client: Stub, wanted: Callable[[dict[str, generate_pb2.GetModelReply]], bool]) -> Callable:
    """Whether the router's models by name are as wanted."""

    async def found() -> bool:
        try:
            listed = await client.ListModels(List())
        except grpc.aio.AioRpcError:  # there has been no worker yet
            return False
        return wanted({each.model.name: each for each in listed.models})

    return found


async def test_requests_go_to_the_model_that_they_name(
    both: Stub, worker: CountingWorker, other: CountingWorker, marked: str
) -> None:
    for name, asked in (("", worker), ("counting", worker), ("marked", other), (marked, other)):
        await replies(both.Generate(request(model=name)))
        assert len(asked.asked) == 1
        asked.asked.clear()
    assert worker.asked == other.asked == []


async def test_each_model_has_its_tokenizer_and_its_limits(both: Stub, other: CountingWorker, model_path: Path) -> None:
    asked = generate_pb2.ChatRequest(
        model="marked", messages=[{"role": "user", "content": "Hi"}], stop={"max_new_tokens": 1}
    )
    await replies(both.Chat(asked))
    assert load_tokenizer(str(model_path)).decode(other.asked[0].token_ids) == "<|im_end|>Hi"
    words = "word " * 100
    await replies(both.Generate(request(words)))
    code, why = await refused(replies(both.Generate(request(words, model="marked"))))
    assert (code, "maximum context length is 64 tokens" in why) == (Code.INVALID_ARGUMENT, True)
    ids = (await both.Tokenize(generate_pb2.TokenizeRequest(model="marked", text="Hi"))).token_ids
    assert (await both.Detokenize(generate_pb2.DetokenizeRequest(model="marked", token_ids=ids))).text == "Hi"


async def test_models_are_described_by_name_the_default_first(both: Stub, router_settings: RouterSettings) -> None:
    listed = (await both.ListModels(List())).models
    assert [(each.model.name, each.is_default, each.workers) for each in listed] == [
        ("counting", True, 1),
        ("marked", False, 1),
    ]
    assert (await both.GetModel(Get())).model.name == "counting"
    assert (await both.GetModel(Get(model="marked"))).model.context_length == 64
    async with running_router(router_settings.model_copy(update={"model": None})) as client:
        assert (await client.GetModel(Get())).is_default  # the first


async def test_an_unknown_name_is_told_the_names_that_there_are(both: Stub) -> None:
    for call in (replies(both.Generate(request(model="large"))), both.GetModel(Get(model="large"))):
        code, why = await refused(call)
        assert code is Code.NOT_FOUND
        assert why == 'model "large" is not served here; use "counting" or "marked" or leave model empty'


async def test_a_full_queue_is_that_of_one_model(
    worker: CountingWorker, other: CountingWorker, router_settings: RouterSettings
) -> None:
    worker.max_sequences = 1
    worker.gate.clear()
    async with running_router(router_settings.model_copy(update={"max_queue": 1})) as client:
        calls = [client.Generate(request(new=2)) for _ in range(2)]
        await asyncio.wait([asyncio.ensure_future(call.read()) for call in calls], return_when="FIRST_COMPLETED")
        await until_waiting(1)
        code, why = await refused(replies(client.Generate(request())))
        assert (code, "1 generations wait already" in why) == (Code.RESOURCE_EXHAUSTED, True)
        assert len(await replies(client.Generate(request(model="marked")))) == 5
        listed = (await client.ListModels(List())).models
        assert {each.model.name: each.waiting for each in listed} == {"counting": 1, "marked": 0}
        worker.gate.set()
        await until_waiting(0)


async def test_a_model_without_a_worker_is_unavailable_alone(
    redis: Redis, worker: CountingWorker, marked: str, router_settings: RouterSettings
) -> None:
    async with running_router(router_settings) as client:
        async with running_worker(redis, name="marked", source=marked):
            await until(serves(client, lambda found: "marked" in found), "the second model")  # while the router runs
            await replies(client.Generate(request(model="marked")))
        await until(serves(client, lambda found: found["marked"].workers == 0), "its worker is gone")
        code, why = await refused(replies(client.Generate(request(model="marked"))))
        assert (code, 'no worker of "marked" is ready' in why) == (Code.UNAVAILABLE, True)
        await replies(client.Generate(request()))


async def test_without_the_default_model_a_name_is_needed(
    other: CountingWorker, router_settings: RouterSettings
) -> None:
    async with running_router(router_settings) as client:
        code, why = await refused(replies(client.Generate(request())))
        assert code is Code.UNAVAILABLE
        assert why.endswith('; or use "marked"')
        await replies(client.Generate(request(model="marked")))


async def test_a_tokenizer_that_cannot_be_loaded_is_one_models_trouble(
    redis: Redis, worker: CountingWorker, marked: str, router_settings: RouterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "LOAD_AGAIN_S", 0.0)
    late = Path(marked).with_name("late")
    async with running_worker(redis, name="late", source=str(late)), running_router(router_settings) as client:
        code, why = await refused(replies(client.Generate(request(model="late"))))
        assert code is Code.UNAVAILABLE
        assert why.startswith('the model "late" cannot be used here, because the router cannot load its tokenizer')
        assert str(late) in why
        assert (await refused(client.GetModel(Get(model="late"))))[1] == why
        assert {each.model.name: each.unavailable for each in (await client.ListModels(List())).models} == {
            "counting": "",
            "late": why,
        }
        await replies(client.Generate(request()))
        late.symlink_to(marked)
        await until(serves(client, lambda found: not found["late"].unavailable), "it is loaded again")
        await replies(client.Generate(request(model="late")))


async def test_a_session_stays_with_its_model(both: Stub, other: CountingWorker, worker: CountingWorker) -> None:
    session = (await both.OpenSession(Open(model="marked"))).session_id
    await replies(both.Generate(request(session_id=session)))
    await replies(both.Generate(request(session_id=session, model="marked")))
    assert (len(other.asked), len(worker.asked)) == (2, 0)
    assert (await both.GetModel(Get(session_id=session))).model.name == "marked"
    assert (await both.ListSessions(generate_pb2.ListSessionsRequest())).sessions[0].model == "marked"
    for call in (
        replies(both.Generate(request(session_id=session, model="counting"))),
        both.OpenSession(Open(branch_of=session, model="counting")),
    ):
        code, why = await refused(call)
        assert (code, f'session "{session}" is of the model "marked"' in why) == (Code.INVALID_ARGUMENT, True)
    branch = (await both.OpenSession(Open(branch_of=session))).session_id
    await replies(both.Generate(request(session_id=branch)))
    assert len(other.asked) == 3
    rejoined = await replies(both.Rejoin(generate_pb2.RejoinRequest(session_id=branch, received=1)))
    assert [each.token.index for each in rejoined if each.HasField("token")] == [1, 2]


async def test_a_removed_model_finishes_what_was_accepted(
    redis: Redis, worker: CountingWorker, marked: str, router_settings: RouterSettings
) -> None:
    async with running_router(router_settings) as client:
        facts: dict[str, bool] = {}
        async with running_worker(redis, facts, name="marked", source=marked, max_sequences=1) as leaving:
            await until(serves(client, lambda found: "marked" in found), "the second model")
            session = (await client.OpenSession(Open(model="marked"))).session_id
            await replies(client.Generate(request(session_id=session)))
            leaving.gate.clear()
            calls = [client.Generate(request(model="marked", new=2)) for _ in range(2)]
            running = [asyncio.ensure_future(replies(call)) for call in calls]
            await until_waiting(1)
            facts["retiring"] = True

            async def refuses() -> bool:
                try:
                    await client.GetModel(Get(model="marked"))
                except grpc.aio.AioRpcError as error:
                    return error.code() is Code.NOT_FOUND and error.details() == (
                        'the model "marked" is being removed; use "counting" or leave model empty'
                    )
                return False

            await until(refuses, "nothing new is taken")
            leaving.gate.set()
            assert [len(got) for got in await asyncio.gather(*running)] == [4, 4]
        await until(serves(client, lambda found: list(found) == ["counting"]), "the model is gone")
        code, why = await refused(replies(client.Generate(request(session_id=session))))
        assert code is Code.FAILED_PRECONDITION
        assert f'session "{session}" has ended: its model "marked" is not served any more' in why
        await client.CloseSession(generate_pb2.CloseSessionRequest(session_id=session))
        await replies(client.Generate(request()))


async def test_a_model_is_forgotten_when_it_was_away_for_long(
    redis: Redis, worker: CountingWorker, marked: str, router_settings: RouterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "FORGET_S", 0.0)
    async with running_router(router_settings) as client:
        async with running_worker(redis, name="marked", source=marked):
            await until(serves(client, lambda found: "marked" in found), "the second model")
        await until(serves(client, lambda found: list(found) == ["counting"]), "it is forgotten")
        assert (await refused(client.GetModel(Get(model="marked"))))[0] is Code.NOT_FOUND


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("SmolLM2-135M", "SmolLM2-135M", True),
        ("owner/SmolLM2-135M", "SmolLM2-135M", True),
        ("owner/SmolLM2-135M", "other/SmolLM2-135M", False),
        ("SmolLM2-135M", "SmolLM2-360M", False),
    ],
)
def test_a_directory_may_have_the_name_of_a_model_of_the_hub(one: str, two: str, same: bool) -> None:
    assert models._same(one, two) is models._same(two, one) is same
