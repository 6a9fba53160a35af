"""Calls of replicas whose refusal or whose answer is lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from qaq.v1 import originals_pb2 as pb
from qaq.v1 import originals_pb2_grpc

from qaq_core.base.errors import OriginalsError
from services.common.server import GrpcServer
from services.originals import replicas


class Full(originals_pb2_grpc.OriginalsServicer):
    """Has no room for a page, and says so while the rest of it is on its way."""

    async def Put(self, requests: AsyncIterator[pb.PutRequest], context: Any) -> pb.PutReply:
        await anext(requests)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        raise AssertionError("abort raises")


async def test_a_refusal_while_a_page_is_sent_is_one_for_now() -> None:
    """Of some of them grpc.aio's client does not say what they were."""
    server = GrpcServer()
    server.add("qaq.v1.Originals", originals_pb2_grpc.add_OriginalsServicer_to_server, Full())
    address = await server.start()

    async def find() -> list[str]:
        return [address]

    async def pieces() -> AsyncIterator[pb.PutRequest]:
        for _ in range(100):
            yield pb.PutRequest(chunk={"data": b"x" * 1000})
            await asyncio.sleep(0.001)

    made = replicas.Replicas(find)
    for _ in range(12):
        calls = (made.call(b"", lambda stub: stub.Put(pieces(), timeout=20), tries=1) for _ in range(8))
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(end) for end in ends] == [replicas.NoAnswerError] * 8, ends
    await made.close()
    await server.stop(0)


LOST = grpc.aio.AioRpcError(
    grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), details="Internal error from Core"
)


async def test_a_call_whose_answer_was_lost_is_made_again() -> None:
    async def find() -> list[str]:
        return ["127.0.0.1:1"]  # nobody is called

    async def call(stub: replicas.Stub) -> str:
        if answers:
            raise answers.pop()
        return "an answer"

    made = replicas.Replicas(find)
    answers = [LOST]
    assert await made.call(b"", call) == "an answer"
    answers = [LOST]
    with pytest.raises(replicas.NoAnswerError):  # which is tried again where it matters
        await made.call(b"", call, tries=1)
    told = grpc.aio.AioRpcError(LOST.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), details="internal error")
    answers = [told, told]
    with pytest.raises(OriginalsError) as caught:
        await made.call(b"", call)
    assert not isinstance(caught.value, replicas.NoAnswerError)
    assert answers == [told], "what a server says itself is not asked for again"
    await made.close()
