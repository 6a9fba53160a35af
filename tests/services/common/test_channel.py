"""Channels notice a peer that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cluster.stack import python_path
from services.common import channel as channels
from services.common.channel import open_channel

SERVER = """
import asyncio
from services.common.server import GrpcServer

async def main():
    server = GrpcServer()
    print(await server.start(), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
# Much longer than pings take, much shorter than what gRPC waits for by default.
PATIENCE_S = 30
PING_S = 2.0


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings come twice as often as otherwise, so that half as long is waited for them."""
    faster = {channels._MS: int(1000 * PING_S)}
    monkeypatch.setattr(channels, "_OPTIONS", [(name, faster.get(value, value)) for name, value in channels._OPTIONS])


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[tuple[Process, grpc.aio.UnaryStreamCall]]:
    """A server's process and a stream from it, which is silent after its first message."""
    environment = os.environ | {"PYTHONPATH": python_path()}
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, stdout=PIPE, env=environment)
    assert server.stdout is not None
    try:
        async with open_channel((await server.stdout.readline()).decode().strip()) as channel:
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
            yield server, watching
    finally:
        server.kill()
        await server.wait()


@pytest.mark.slow
async def test_a_stream_from_a_process_that_was_stopped_ends() -> None:
    async with watched() as (server, watching):
        server.send_signal(signal.SIGSTOP)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async with asyncio.timeout(PATIENCE_S):
                await watching.read()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.slow
async def test_a_silent_stream_of_a_process_that_lives_goes_on() -> None:
    """The server does not take the pings for an attack."""
    async with watched() as (_, watching):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(4 * PING_S):
                await watching.read()
