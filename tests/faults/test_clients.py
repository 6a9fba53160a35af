"""Clients that are slow or vanish, and gateways that die under them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from openai import AsyncOpenAI
from qaq.v1 import generate_pb2, worker_pb2, worker_pb2_grpc

from services.common.channel import PING_S, open_channel
from services.common.redis import connect
from tests.faults.hearing import NEW, STORY, Heard, Stub, asked, hear, listen, opened
from tests.faults.processes import Processes

VANISHING = 12


@dataclass
class Served:
    processes: Processes
    worker: str
    gateway: str
    model: str


@pytest.fixture(scope="module")
def served(processes: Processes) -> Served:
    """A worker, a router and a gateway."""
    worker, router = processes.start("worker"), processes.start("router")
    processes.until_serving(worker, router)
    gateway = processes.start("gateway")
    processes.until_answering(gateway)
    with urllib.request.urlopen(f"http://{gateway}/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    return Served(processes, worker, gateway, model)


def sent(served: Served, gateway: str = "", **more: Any) -> socket.socket:
    """A connection over which a completion was asked for, with a small buffer for the answer."""
    body: dict[str, Any] = {"model": served.model, "prompt": STORY, "max_tokens": NEW, "temperature": 0}
    body |= {"ignore_eos": True, "cache": {"preset": "fp16"}} | more
    host, _, port = (gateway or served.gateway).rpartition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(120)
    connection.connect((host, int(port)))
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    connection.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n" + raw)
    return connection


async def until_idle(served: Served) -> None:
    """Waits until nothing of a client is left: no sequence, no cache, no hold."""
    redis = connect(served.processes.redis.url)
    async with open_channel(served.worker) as channel, asyncio.timeout(300):
        stub = worker_pb2_grpc.WorkerStub(channel)
        while True:
            described = await stub.Describe(worker_pb2.DescribeRequest(), timeout=30)
            holds = [key async for key in redis.scan_iter("qaq:session:*:run")]
            if not described.running + described.waiting + described.kv_bytes and not holds:
                break
            await asyncio.sleep(0.2)
    await redis.aclose()


def rest(connection: socket.socket) -> bytes:
    """What comes until the other side ends."""
    got = b""
    with connection, contextlib.suppress(ConnectionError):
        while piece := connection.recv(4096):
            got += piece
    return got


async def close_all(client: Stub) -> None:
    for info in (await client.ListSessions(generate_pb2.ListSessionsRequest())).sessions:
        await client.CloseSession(generate_pb2.CloseSessionRequest(session_id=info.session_id))


async def read(gateway: str, model: str, pieces: list[str], event: Callable[[], Awaitable[None]] | None = None) -> None:
    """Adds the pieces of a completion as they come; `event` happens after a quarter of them."""
    body = {"ignore_eos": True, "cache": {"preset": "fp16"}}
    async with AsyncOpenAI(base_url=f"http://{gateway}/v1", api_key="none", max_retries=0, timeout=120) as openai:
        async for chunk in await openai.completions.create(
            model=model, prompt=STORY, max_tokens=NEW, temperature=0, stream=True, extra_body=body
        ):
            pieces += [choice.text for choice in chunk.choices]
            if event is not None and len(pieces) == NEW // 4:
                await event()


async def test_a_slow_client_holds_up_nobody_else(served: Served, client: Stub) -> None:
    """Over gRPC and HTTP; it reads on when all others have ended, and has missed nothing."""
    slow, late = Heard(), client.Generate(asked(await opened(client)), timeout=300)
    over_http = await asyncio.to_thread(sent, served, stream=True)
    await asyncio.to_thread(over_http.recv, 64)
    await asyncio.gather(*[hear(client, await opened(client)) for _ in range(4)])
    await listen(late, slow)
    assert len(slow.tokens) == slow.usage.generated_tokens == NEW
    assert b"data: [DONE]" in await asyncio.to_thread(rest, over_http)


async def test_clients_that_vanish_leave_nothing_behind(served: Served, client: Stub) -> None:
    """In the middle of a stream, before it begins, and while they wait in the queue."""
    await close_all(client)
    connections = await asyncio.gather(
        *(asyncio.to_thread(sent, served, stream=place % 2 == 0, prompt=[STORY] * 2) for place in range(VANISHING))
    )
    calls = [client.Generate(asked(""), timeout=300) for _ in range(VANISHING)]
    await asyncio.to_thread(connections[0].recv, 64)
    await calls[0].read()
    for connection in connections:
        connection.close()
    for call in calls:
        call.cancel()
    await until_idle(served)
    await asyncio.gather(*(hear(client, "") for _ in range(8)))  # every place is free


async def test_a_gateway_that_is_killed_frees_what_it_ran(served: Served, client: Stub) -> None:
    """Its clients see a broken connection and ask again, at another gateway."""
    await close_all(client)
    victim = served.processes.start("gateway")
    await asyncio.to_thread(served.processes.until_answering, victim)  # the router of `client` may be asked
    connection = await asyncio.to_thread(sent, served, victim, stream=True)
    begun = await asyncio.to_thread(connection.recv, 1024)
    served.processes.kill(victim)
    broken = begun + await asyncio.to_thread(rest, connection)
    assert b"data: " in broken
    assert b"data: [DONE]" not in broken
    await until_idle(served)
    again = await asyncio.to_thread(sent, served, stream=True)
    assert b"data: [DONE]" in await asyncio.to_thread(rest, again)


async def test_a_turn_goes_on_elsewhere_while_its_router_hangs(served: Served, client: Stub) -> None:
    """The worker does not compute for it any longer than the client waits for it."""
    session, received = await opened(client), 0
    request = asked(session)
    request.stop.max_new_tokens = 4000
    router = served.processes.start("router")
    served.processes.until_serving(router)
    async with open_channel(router) as channel:
        async for reply in Stub(channel).Generate(request, timeout=300):
            received += reply.HasField("token")
            if received == NEW // 4:
                break
        with served.processes.stopped(router):
            rejoin = generate_pb2.RejoinRequest(session_id=session, received=received)
            async for reply in client.Rejoin(rejoin, timeout=5 * PING_S):
                if reply.HasField("token"):
                    break
    assert reply.token.index == received
    served.processes.kill(router)
    await close_all(client)


async def test_a_gateway_that_hangs_goes_on_when_it_wakes_up(served: Served) -> None:
    whole: list[str] = []
    pieces: list[str] = []

    async def hang() -> None:
        with served.processes.stopped(served.gateway):
            await asyncio.sleep(3)

    await read(served.gateway, served.model, whole)
    await read(served.gateway, served.model, pieces, hang)
    assert "".join(pieces) == "".join(whole)
