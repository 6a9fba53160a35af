"""Clients that begin calls and say nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from qaq.v1 import generate_pb2 as pb
from qaq.v1 import generate_pb2_grpc

from services.common import interceptor
from services.common import server as server_module
from services.common.channel import open_channel
from services.common.server import GrpcServer

METHODS = {"stream_unary": "Tokenize", "stream_stream": "Generate"}


class Slow(generate_pb2_grpc.InferenceServicer):
    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeReply:
        return pb.TokenizeReply(token_ids=[len(request.text)])

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateReply]:
        for _ in range(8):
            await asyncio.sleep(0.1)
            yield pb.GenerateReply(session_id="one")


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = GrpcServer()
    server.add("qaq.v1.Inference", generate_pb2_grpc.add_InferenceServicer_to_server, Slow())
    yield await server.start()
    await server.stop(0)


async def nothing(seconds: float) -> AsyncIterator[bytes]:
    await asyncio.sleep(seconds)
    return
    yield b""


async def refusal(address: str, kind: str, given: AsyncIterator[bytes]) -> grpc.aio.AioRpcError:
    """What a call without a message ends with."""
    async with open_channel(address) as channel:
        call = getattr(channel, kind)(f"/qaq.v1.Inference/{METHODS[kind]}")(given, timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call if kind == "stream_unary" else call.read())
    return caught.value


@pytest.mark.parametrize("kind", METHODS)
async def test_a_call_that_never_begins(address: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(interceptor, "MESSAGE_S", 0.2)
    refused = await refusal(address, kind, nothing(15))
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "no message came for 0.2 s" in (refused.details() or "")


@pytest.mark.parametrize("kind", METHODS)
async def test_a_call_without_a_message(address: str, kind: str) -> None:
    refused = await refusal(address, kind, nothing(0))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no message" in (refused.details() or "")


async def test_an_old_connection_ends_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_AGE_MS", 200)
    server = GrpcServer()
    server.add("qaq.v1.Inference", generate_pb2_grpc.add_InferenceServicer_to_server, Slow())
    async with open_channel(await server.start()) as channel:
        stub = generate_pb2_grpc.InferenceStub(channel)
        replies = [reply async for reply in stub.Generate(pb.GenerateRequest(prompt="x"), timeout=20)]
        assert len(replies) == 8
        assert (await stub.Tokenize(pb.TokenizeRequest(text="fine"), timeout=20)).token_ids == [4]
    await server.stop(0)
