"""What clients may do to a running stack, and that it goes on serving the others."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from qaq.v1 import generate_pb2, generate_pb2_grpc, worker_pb2, worker_pb2_grpc

from services.common.channel import open_channel
from services.common.keys import authorization

from .composed import Composed

Stub = generate_pb2_grpc.InferenceStub
Code = grpc.StatusCode


def request(prompt: str, new: int = 12, **more: object) -> generate_pb2.GenerateRequest:
    fields: dict = {"sampling": {"temperature": 0}, "stop": {"max_new_tokens": new}, **more}
    return generate_pb2.GenerateRequest(prompt=prompt, **fields)


async def text_of(call: grpc.aio.UnaryStreamCall) -> str:
    replies = [reply async for reply in call]
    assert replies[-1].WhichOneof("event") == "finished"
    return "".join(reply.token.text for reply in replies) + replies[-1].finished.text


async def describe(composed: Composed) -> worker_pb2.DescribeReply:
    async with open_channel(composed.addresses["worker"], composed.identity("operator"), "worker") as channel:
        return await worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest())


async def until_idle(composed: Composed) -> worker_pb2.DescribeReply:
    for _ in range(300):
        facts = await describe(composed)
        if facts.running == 0 and facts.waiting == 0:
            return facts
        await asyncio.sleep(0.1)
    raise AssertionError(f"the worker is still busy: {facts}")


async def test_two_clients_at_once_get_their_own_answers(client: Stub) -> None:
    prompts = ("The capital of France is", "Two plus two equals")
    alone = [await text_of(client.Generate(request(prompt))) for prompt in prompts]
    together = await asyncio.gather(*(text_of(client.Generate(request(prompt))) for prompt in prompts))
    assert together == alone
    assert alone[0] != alone[1]


async def test_a_cancelled_call_frees_its_session(client: Stub, composed: Composed) -> None:
    call = client.Generate(request("Once upon a time", new=2000, stop={"max_new_tokens": 2000, "ignore_eos": True}))
    while (await call.read()).WhichOneof("event") != "token":
        pass
    assert (await describe(composed)).running == 1
    call.cancel()
    facts = await until_idle(composed)
    assert facts.sessions == 0
    assert facts.kv_bytes == 0
    for _ in range(100):
        if not (await client.ListSessions(generate_pb2.ListSessionsRequest())).sessions:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the session is still listed")


async def test_a_deadline_frees_its_session(client: Stub, composed: Composed) -> None:
    endless = request("Once upon a time", stop={"max_new_tokens": 2000, "ignore_eos": True})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await text_of(client.Generate(endless, timeout=1.0))
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    assert (await until_idle(composed)).kv_bytes == 0


async def test_a_session_answers_as_the_whole_conversation_does(client: Stub, composed: Composed) -> None:
    exact = {"preset": "fp16"}
    opened = generate_pb2.OpenSessionRequest(cache=exact)
    session = (await client.OpenSession(opened)).session_id
    first = {"role": "user", "content": "Name one colour of the rainbow."}
    second = {"role": "user", "content": "And another one?"}
    more = {"sampling": {"temperature": 0}, "stop": {"max_new_tokens": 16}}
    answers = []
    for turn in (first, second):
        chat = generate_pb2.ChatRequest(messages=[turn], session_id=session, **more)
        answers.append(await text_of(client.Chat(chat)))
    whole = [first, {"role": "assistant", "content": answers[0]}, second]
    again = generate_pb2.ChatRequest(messages=whole, cache=exact, **more)
    assert await text_of(client.Chat(again)) == answers[1]
    assert (await until_idle(composed)).sessions == 1
    await client.CloseSession(generate_pb2.CloseSessionRequest(session_id=session))
    assert (await describe(composed)).sessions == 0


BAD = [
    (request(""), Code.INVALID_ARGUMENT, "prompt is empty"),
    (request("word " * 9000), Code.INVALID_ARGUMENT, "has room for"),
    (request("hi", new=-1), Code.INVALID_ARGUMENT, "max_new_tokens is -1"),
    (request("hi", new=2**31 - 1), Code.INVALID_ARGUMENT, "send less"),
    (request("hi", sampling={"temperature": -0.5}), Code.INVALID_ARGUMENT, "temperature is -0.5"),
    (request("hi", session_id="nobody"), Code.NOT_FOUND, "does not exist"),
    (request("hi", model="gpt-9"), Code.NOT_FOUND, "is not served here"),
    (request("x" * (10 << 20)), Code.INVALID_ARGUMENT, "make it shorter"),
    (request("hi", stop={"max_new_tokens": 1, "stop": ["x"] * 1000}), Code.INVALID_ARGUMENT, "at most 16"),
]


async def test_bad_input_is_refused_and_others_are_served_meanwhile(client: Stub, composed: Composed) -> None:
    alone = await text_of(client.Generate(request("The capital of France is", new=40)))
    meanwhile = asyncio.create_task(text_of(client.Generate(request("The capital of France is", new=40))))
    for bad, code, sentence in BAD:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await text_of(client.Generate(bad))
        assert caught.value.code() is code
        assert sentence in caught.value.details()
    async with open_channel(composed.addresses["router"], composed.identity("client"), "router") as channel:
        raw = channel.unary_stream("/qaq.v1.Inference/Generate")(
            b"\x12\x02\xff\xfe", metadata=authorization(composed.key)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw.read()
    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert "UTF-8" in caught.value.details()
    assert await meanwhile == alone
