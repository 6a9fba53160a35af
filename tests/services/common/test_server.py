"""GrpcServer: statuses, limits, health, reflection, ports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from qaq.v1 import generate_pb2 as pb
from qaq.v1 import generate_pb2_grpc
from redis import exceptions as redis_errors
from structlog.testing import capture_logs

from qaq_core.base import errors as core
from services.common import server as server_module
from services.common.channel import open_channel
from services.common.errors import InvalidArgument, ResourceExhausted
from services.common.server import GrpcServer, PortTakenError

Code = grpc.StatusCode
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
ERRORS = {
    "argument": (InvalidArgument("top_p must be in (0, 1]"), Code.INVALID_ARGUMENT, "top_p must be in (0, 1]"),
    "config": (core.ConfigError("bits must be positive"), Code.INVALID_ARGUMENT, "bits must be positive"),
    "model": (core.UnsupportedModelError("no ALiBi"), Code.FAILED_PRECONDITION, "no ALiBi"),
    "corrupt": (core.CorruptPageError("page 7"), Code.DATA_LOSS, "page 7"),
    "originals": (core.OriginalsError("store failed"), Code.UNAVAILABLE, "store failed"),
    "oom": (redis_errors.OutOfMemoryError("OOM"), Code.RESOURCE_EXHAUSTED, "Redis is full"),
    "oom in a script": (
        redis_errors.ResponseError("Error running script: @user_script:6: -OOM command not allowed when used memory >"),
        Code.RESOURCE_EXHAUSTED,
        "Redis is full",
    ),
    "disk": (
        redis_errors.ResponseError("MISCONF Errors writing to the AOF file: No space left on device"),
        Code.UNAVAILABLE,
        "cannot write to its disk",
    ),
    "down": (redis_errors.ConnectionError("refused"), Code.UNAVAILABLE, "Redis does not answer"),
    "late": (TimeoutError(), Code.DEADLINE_EXCEEDED, "deadline"),
    "bug": (ZeroDivisionError("secret detail"), Code.INTERNAL, "internal error"),
}


class Failing(generate_pb2_grpc.InferenceServicer):
    """Raises the error that the request's text names; otherwise answers."""

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeReply:
        if request.text in ERRORS:
            raise ERRORS[request.text][0]
        return pb.TokenizeReply(token_ids=[len(request.text)])

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateReply]:
        yield pb.GenerateReply(session_id="one")
        raise ResourceExhausted("the queue is full", retry_after_ms=250)


async def test_a_stop_that_does_not_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STOP_S", 0.1)
    server = GrpcServer()
    await server.start()
    inner = server._server
    assert inner is not None
    let_go = asyncio.Event()

    async def endless(grace: float) -> None:
        await let_go.wait()

    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(inner, "stop", endless)
        await server.stop(0)
    assert [entry["event"] for entry in logs] == ["cancelled calls have not ended; they are abandoned"]
    let_go.set()
    await inner.stop(0)


@pytest.fixture
async def server() -> AsyncIterator[GrpcServer]:
    server = GrpcServer(max_request_bytes=10_000)
    server.add("qaq.v1.Inference", generate_pb2_grpc.add_InferenceServicer_to_server, Failing())
    yield server
    await server.stop(0)


@pytest.fixture
async def channel(server: GrpcServer) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(await server.start()) as channel:
        yield channel


@pytest.mark.parametrize("name", ERRORS)
async def test_errors_become_statuses(channel: grpc.aio.Channel, name: str) -> None:
    stub = generate_pb2_grpc.InferenceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(pb.TokenizeRequest(text=name), timeout=10)
    _, code, message = ERRORS[name]
    assert caught.value.code() is code
    assert message in caught.value.details()
    assert "secret" not in caught.value.details()
    # The server goes on.
    assert (await stub.Tokenize(pb.TokenizeRequest(text="fine"), timeout=10)).token_ids == [4]


async def test_an_error_inside_a_stream_keeps_what_was_sent_and_says_when_to_retry(
    channel: grpc.aio.Channel,
) -> None:
    call = generate_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(prompt="x"), timeout=10)
    assert (await call.read()).session_id == "one"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    assert dict(await call.trailing_metadata())["retry-after-ms"] == "250"


async def test_invalid_utf8_is_an_invalid_argument(channel: grpc.aio.Channel) -> None:
    for kind, name in (("unary_unary", "Tokenize"), ("unary_stream", "Generate")):
        call = getattr(channel, kind)(f"/qaq.v1.Inference/{name}")(b"\x12\x02\xff\xfe", timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call if kind == "unary_unary" else call.read())
        assert caught.value.code() is Code.INVALID_ARGUMENT
        assert "UTF-8" in caught.value.details()


async def test_an_oversized_request_is_an_invalid_argument(channel: grpc.aio.Channel) -> None:
    stub = generate_pb2_grpc.InferenceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(pb.TokenizeRequest(text="a" * 20_000), timeout=10)
    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert "10,000" in caught.value.details()


async def test_health_and_reflection(server: GrpcServer) -> None:
    async with open_channel(await server.start()) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "qaq.v1.Inference"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert reply.status == SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = reflection.ServerReflectionInfo(timeout=10)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = {service.name for service in (await call.read()).list_services_response.service}
        assert {"qaq.v1.Inference", "grpc.health.v1.Health"} <= listed
        call.cancel()
        watch = health.Watch(health_pb2.HealthCheckRequest(service="qaq.v1.Inference"), timeout=10)
        assert (await watch.read()).status == SERVING
        await server.stop(0.5)
        assert (await watch.read()).status == NOT_SERVING


async def test_a_taken_port_is_said_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}.*choose another port"):
            await GrpcServer(port=port).start()


async def test_two_servers_do_not_share_a_port(server: GrpcServer) -> None:
    port = int((await server.start()).rpartition(":")[2])
    with pytest.raises(PortTakenError):
        await GrpcServer(port=port).start()


async def test_the_advertised_host_is_what_others_are_told() -> None:
    server = GrpcServer("127.0.0.1", 0, advertise_host="worker-1")
    try:
        assert (await server.start()).startswith("worker-1:")
    finally:
        await server.stop(0)
