from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import grpc
import pytest
from qaq.v1 import generate_pb2, generate_pb2_grpc
from redis.asyncio import Redis

from services.common.settings import RouterSettings
from services.router.hold import LEFT_TTL_S

from .conftest import CONTEXT, CountingWorker, running_router, running_worker

Stub = generate_pb2_grpc.InferenceStub
Code = grpc.StatusCode


def request(prompt: str = "Once upon a time", new: int = 3, **more: object) -> generate_pb2.GenerateRequest:
    fields: dict = {"prompt": prompt, "stop": {"max_new_tokens": new}, **more}
    return generate_pb2.GenerateRequest(**fields)


async def replies(call: grpc.aio.UnaryStreamCall) -> list[generate_pb2.GenerateReply]:
    return [reply async for reply in call]


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Waits for something that another task brings about."""
    for _ in range(1000):
        if await condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never happened: {what}")


async def test_a_stream_is_the_workers_with_indexes(client: Stub, worker: CountingWorker) -> None:
    got = await replies(client.Generate(request()))
    assert [reply.WhichOneof("event") for reply in got] == ["prefill", "token", "token", "token", "finished"]
    (asked,) = worker.asked
    n = len(asked.token_ids)
    assert (got[0].prefill.tokens_done, got[0].prefill.tokens_total) == (n, n)
    assert [(r.token.index, r.token.token_id, r.token.text) for r in got[1:4]] == [(i, n + i, "é ") for i in range(3)]
    assert got[-1].finished.usage.generated_tokens == 3
    assert got[-1].finished.text == "end"
    assert {reply.session_id for reply in got} == {asked.session_id}
    assert not asked.keep


async def test_a_session_for_one_call_leaves_what_expires(client: Stub, redis: Redis) -> None:
    await replies(client.Generate(request()))
    left = [key async for key in redis.scan_iter("qaq:session*")]
    assert left
    assert all([0 < await redis.ttl(key) <= LEFT_TTL_S for key in left])


async def test_a_later_turn_sends_the_whole_log(client: Stub, worker: CountingWorker) -> None:
    session = (await client.OpenSession(generate_pb2.OpenSessionRequest(cache={"target_bits": 3}))).session_id
    first = (await client.Tokenize(generate_pb2.TokenizeRequest(text="Once upon a time"))).token_ids
    second = (await client.Tokenize(generate_pb2.TokenizeRequest(text=" and then", no_special_tokens=True))).token_ids
    for prompt in ("Once upon a time", " and then"):
        await replies(client.Generate(request(prompt, session_id=session)))
    n = len(first)
    assert [list(asked.token_ids) for asked in worker.asked] == [
        list(first),
        [*first, n, n + 1, n + 2, *second],
    ]
    assert all(asked.keep and asked.cache.target_bits == 3 for asked in worker.asked)
    (listed,) = (await client.ListSessions(generate_pb2.ListSessionsRequest())).sessions
    assert (listed.tokens, listed.worker, listed.running) == (n + 3 + len(second) + 3, worker.address, False)
    await client.CloseSession(generate_pb2.CloseSessionRequest(session_id=session))
    assert worker.dropped == [session]


async def test_a_branch_sends_its_origins_log(client: Stub, worker: CountingWorker) -> None:
    origin = (await client.OpenSession(generate_pb2.OpenSessionRequest(cache={"target_bits": 3}))).session_id
    await replies(client.Generate(request("Once upon a time", 2, session_id=origin)))
    branch = (await client.OpenSession(generate_pb2.OpenSessionRequest(branch_of=origin))).session_id
    await replies(client.Generate(request(" and then", 2, session_id=branch)))
    first, second = worker.asked
    log = [*first.token_ids, len(first.token_ids), len(first.token_ids) + 1]
    assert second.token_ids[: len(log)] == log
    assert (second.history_tokens, second.branch_of, second.cache.target_bits) == (len(log), origin, 3)
    with pytest.raises(grpc.aio.AioRpcError, match="has the cache parameters of its origin"):
        await client.OpenSession(generate_pb2.OpenSessionRequest(branch_of=origin, cache={"target_bits": 3}))


async def test_parameters_reach_the_worker_and_a_seed_is_drawn(client: Stub, worker: CountingWorker) -> None:
    fields = {
        "sampling": {"temperature": 2, "frequency_penalty": 0.5, "logit_bias": {7: -3}},
        "stop": {"stop_token_ids": [9]},
        "output": {"logprobs": True, "top_logprobs": 2, "echo": True},
        "choices": 3,
    }
    asked = generate_pb2.GenerateRequest(prompt_token_ids=[5, 6], **fields)
    with contextlib.suppress(grpc.aio.AioRpcError):  # this worker has one choice
        await replies(client.Generate(asked))
    (sent,) = worker.asked
    assert list(sent.token_ids) == [5, 6]
    assert (sent.stop, sent.output, sent.choices, sent.history_tokens) == (asked.stop, asked.output, 3, 0)
    assert sent.sampling.HasField("seed")
    sent.sampling.ClearField("seed")
    assert sent.sampling == asked.sampling
    chosen = generate_pb2.GenerateRequest(prompt="x", sampling={"seed": 4}, stop={"max_new_tokens": 1})
    await replies(client.Generate(chosen))
    assert worker.asked[1].sampling.seed == 4


async def test_chat_uses_the_template(client: Stub, worker: CountingWorker) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    await replies(client.Chat(generate_pb2.ChatRequest(messages=messages, stop={"max_new_tokens": 1})))
    text = generate_pb2.TokenizeRequest(
        text="<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", no_special_tokens=True
    )
    tail = list((await client.Tokenize(text)).token_ids)
    assert list(worker.asked[0].token_ids)[-len(tail) :] == tail


async def test_cancelling_ends_the_workers_call_and_keeps_the_session(client: Stub, worker: CountingWorker) -> None:
    session = (await client.OpenSession(generate_pb2.OpenSessionRequest())).session_id
    worker.gate.clear()
    call = client.Generate(request(session_id=session))
    while (await call.read()).WhichOneof("event") != "token":
        pass
    call.cancel()

    async def free() -> bool:
        # The router and the worker notice it independently.
        (listed,) = (await client.ListSessions(generate_pb2.ListSessionsRequest())).sessions
        return not listed.running and worker.ended == [session] and bool(worker.cancelled)

    await until(free, "the session and the worker were freed")
    assert worker.cancelled == [(session, worker.asked[0].fence)]
    worker.gate.set()
    await replies(client.Generate(request(" more", session_id=session)))
    n = len(worker.asked[0].token_ids)
    assert list(worker.asked[1].token_ids[: n + 1]) == [*worker.asked[0].token_ids, n]


async def test_a_cancelled_call_for_itself_leaves_its_session_for_a_minute(
    client: Stub, worker: CountingWorker, redis: Redis
) -> None:
    """Its client may have lost the connection alone."""
    worker.gate.clear()
    call = client.Generate(request())
    while (await call.read()).WhichOneof("event") != "token":
        pass
    call.cancel()

    async def left() -> bool:
        return not [key async for key in redis.scan_iter("qaq:session:*:run")]

    await until(left, "the session was released")
    keys = [key async for key in redis.scan_iter("qaq:session*")]
    assert len(keys) == 2, keys  # facts and log
    assert all([0 < await redis.ttl(key) <= LEFT_TTL_S for key in keys])
    assert len(worker.ended) == 1


async def test_closing_a_session_ends_its_generation(client: Stub, worker: CountingWorker) -> None:
    session = (await client.OpenSession(generate_pb2.OpenSessionRequest())).session_id
    worker.gate.clear()
    call = client.Generate(request(session_id=session))
    while (await call.read()).WhichOneof("event") != "token":
        pass
    with pytest.raises(grpc.aio.AioRpcError) as second:
        await replies(client.Generate(request(session_id=session)))
    assert second.value.code() is Code.FAILED_PRECONDITION
    assert "is generating" in second.value.details()
    await client.CloseSession(generate_pb2.CloseSessionRequest(session_id=session))
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await call.read()
    assert ended.value.code() is Code.ABORTED
    assert "was closed while it generated" in ended.value.details()
    assert worker.ended == [session]


async def test_a_busy_worker_is_passed_over(client: Stub, worker: CountingWorker, redis: Redis) -> None:
    worker.refuse = Code.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as full:
        await replies(client.Generate(request()))
    assert full.value.code() is Code.RESOURCE_EXHAUSTED
    assert dict(full.value.trailing_metadata())["retry-after-ms"]
    async with running_worker(redis) as other:

        async def two() -> bool:
            return (await client.GetModel(generate_pb2.GetModelRequest())).workers == 2

        await until(two, "the second worker was found")
        await replies(client.Generate(request()))
        assert len(other.asked) == 1


async def test_a_worker_that_drains_gets_nothing_new(client: Stub, worker: CountingWorker, redis: Redis) -> None:
    facts = dict[str, bool]()

    async def serving() -> int:
        return int((await client.GetModel(generate_pb2.GetModelRequest())).workers)

    async with running_worker(redis, facts) as other:
        await until(lambda: _is(serving, 2), "the second worker was found")
        facts["draining"] = True
        await until(lambda: _is(serving, 1), "it was left out")
        for _ in range(3):
            await replies(client.Generate(request()))
    assert (len(worker.asked), len(other.asked)) == (3, 0)


async def _is(count: Callable[[], Awaitable[int]], expected: int) -> bool:
    return await count() == expected


async def test_the_worker_is_told_the_tenant(client: Stub, worker: CountingWorker) -> None:
    for tenant in ("", "somebody"):
        await replies(client.Generate(request(), metadata=(("qaq-tenant", tenant),) if tenant else None))
        assert worker.asked[-1].tenant == tenant
    with pytest.raises(grpc.aio.AioRpcError, match="send at most 128") as refused:
        await replies(client.Generate(request(), metadata=(("qaq-tenant", "x" * 129),)))
    assert refused.value.code() is Code.INVALID_ARGUMENT


async def test_a_prompt_that_never_ran_is_not_in_the_log(client: Stub, worker: CountingWorker) -> None:
    session = (await client.OpenSession(generate_pb2.OpenSessionRequest())).session_id
    worker.refuse = Code.INTERNAL
    with pytest.raises(grpc.aio.AioRpcError):
        await replies(client.Generate(request(session_id=session)))
    assert (await client.ListSessions(generate_pb2.ListSessionsRequest())).sessions[0].tokens == 0


async def test_without_a_worker_a_request_is_told_to_come_back(router_settings: RouterSettings, redis: Redis) -> None:
    async with running_router(router_settings) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replies(client.Generate(request()))
    assert caught.value.code() is Code.UNAVAILABLE
    assert "no worker is ready" in caught.value.details()
    assert dict(caught.value.trailing_metadata())["retry-after-ms"] == "2000"


@pytest.mark.parametrize(
    ("bad", "code", "sentence"),
    [
        (request(""), Code.INVALID_ARGUMENT, "prompt is empty"),
        (request("word " * CONTEXT), Code.INVALID_ARGUMENT, f"{CONTEXT} tokens and has room for {CONTEXT - 1}"),
        (request(new=-5), Code.INVALID_ARGUMENT, "max_new_tokens is -5"),
        (request(new=2**31 - 1), Code.INVALID_ARGUMENT, "send less"),
        (request(new=CONTEXT), Code.INVALID_ARGUMENT, "allows"),
        (request(sampling={"temperature": -1}), Code.INVALID_ARGUMENT, "temperature is -1"),
        (request(session_id="nobody"), Code.NOT_FOUND, 'session "nobody" does not exist'),
        (request(model="gpt-9"), Code.NOT_FOUND, 'model "gpt-9" is not served here; use "counting"'),
        (request("x" * (10 << 20)), Code.INVALID_ARGUMENT, "make it shorter"),
        (request("x" * ((4 << 20) + 1)), Code.INVALID_ARGUMENT, "the limit is 4194304"),
        (request(stop={"max_new_tokens": 1, "stop": ["x"] * 1000}), Code.INVALID_ARGUMENT, "at most 16"),
    ],
    ids=lambda value: value.name if isinstance(value, Code) else None,
)
async def test_bad_input_gets_its_status_and_a_sentence(
    client: Stub, worker: CountingWorker, bad: generate_pb2.GenerateRequest, code: Code, sentence: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await replies(client.Generate(bad))
    assert caught.value.code() is code
    assert sentence in caught.value.details()
    assert worker.asked == []


async def test_invalid_utf8_is_an_invalid_argument(router_settings: RouterSettings, worker: CountingWorker) -> None:
    from services.router.server import RouterServer

    router = RouterServer(router_settings)
    address = await router.start()
    async with grpc.aio.insecure_channel(address) as channel:
        raw = channel.unary_stream("/qaq.v1.Inference/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replies(raw(b"\x12\x02\xff\xfe"))
    await router.stop()
    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert "UTF-8" in caught.value.details()


async def test_a_chat_with_an_opening_and_a_constraint(client: Stub, worker: CountingWorker) -> None:
    message = generate_pb2.ChatMessage(role="user", content="Name a colour.")
    asked = generate_pb2.ChatRequest(messages=[message], stop={"max_new_tokens": 2}, opening=True)
    asked.constraint.regex = "[a-z]+"
    got = await replies(client.Chat(asked))
    assert [reply.WhichOneof("event") for reply in got] == ["opening", "prefill", "token", "token", "finished"]
    assert got[0].opening.text == "<|im_start|>assistant\n"
    assert got[0].session_id == got[1].session_id
    assert worker.asked[-1].constraint.regex == "[a-z]+"
    asked.tools.append('{"type": "function", "function": {"name": "f"}}')
    with pytest.raises(grpc.aio.AioRpcError, match="knows no tools") as caught:
        await replies(client.Chat(asked))
    assert caught.value.code() is Code.FAILED_PRECONDITION
    asked.constraint.regex = "a{5000}"
    with pytest.raises(grpc.aio.AioRpcError, match="repeats something 5000 times"):
        await replies(client.Chat(asked))


async def test_choices_are_bounded_by_what_workers_decode(client: Stub, worker: CountingWorker) -> None:
    told = await client.GetModel(generate_pb2.GetModelRequest())
    assert told.max_choices == worker.max_sequences == 8
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await replies(client.Generate(request(choices=9)))
    assert (caught.value.code(), caught.value.details()) == (Code.INVALID_ARGUMENT, "choices is 9; send 1 to 8")


async def test_a_damaged_log_is_no_internal_error(client: Stub, redis: Redis) -> None:
    session = (await client.OpenSession(generate_pb2.OpenSessionRequest())).session_id
    await replies(client.Generate(request(session_id=session)))
    await redis.append(f"qaq:session:{session}:tokens", b"x")
    for begin in (  # a call begins when it is made
        lambda: client.Generate(request(session_id=session)),
        lambda: client.Rejoin(generate_pb2.RejoinRequest(session_id=session)),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="is damaged in Redis") as caught:
            await replies(begin())
        assert caught.value.code() is Code.FAILED_PRECONDITION
    await client.CloseSession(generate_pb2.CloseSessionRequest(session_id=session))


async def test_what_is_certainly_too_long_is_refused_at_once(client: Stub) -> None:
    text = "x" * 100 * CONTEXT
    chat = generate_pb2.ChatRequest(messages=[{"role": "user", "content": text}])
    for call in (
        replies(client.Generate(request(text))),
        replies(client.Generate(generate_pb2.GenerateRequest(prompt_token_ids=[1] * (CONTEXT + 1)))),
        replies(client.Chat(chat)),
        client.Tokenize(generate_pb2.TokenizeRequest(text=text)),
    ):
        with pytest.raises(
            grpc.aio.AioRpcError, match=rf"is at least \d+ tokens.*length is {CONTEXT} tokens"
        ) as caught:
            await call
        assert caught.value.code() is Code.INVALID_ARGUMENT
        assert dict(caught.value.trailing_metadata())["qaq-reason"] == "context_length_exceeded"
