"""A worker is drained while it streams: its sessions go on on another one, and no client notices."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from qaq.v1 import common_pb2, generate_pb2, generate_pb2_grpc
from redis.asyncio import Redis

from qaq_core.models import LoadedModel
from qaq_core.models.default_model import default_model_path
from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.registry import Registry
from services.common.settings import OriginalsSettings, RouterSettings, WorkerSettings
from services.originals.server import OriginalsServer
from services.router.server import RouterServer
from services.worker.server import WorkerServer

from .command import qaq

Stub = generate_pb2_grpc.InferenceStub
STORY = "The ferryman counted his passengers twice, because one of them was a ghost who paid like the others. "
NEW = 48
PAUSE_S = 0.2
"""Before each token of the stream that is moved: it must last longer than the command that drains its worker takes to
start."""


@pytest.fixture
def workers(redis: Redis, redis_server: EmbeddedRedis, shallow_smollm2: LoadedModel) -> list[WorkerServer]:
    """Two that have not started."""
    settings = {"redis_url": redis_server.url, "page_tokens": 16, "prefix_recompute_tokens": 1, "preset": "fp16"}
    return [WorkerServer(WorkerSettings(model="smollm2", **settings), shallow_smollm2) for _ in range(2)]


@pytest.fixture
async def client(redis_server: EmbeddedRedis, workers: list[WorkerServer]) -> AsyncIterator[Stub]:
    """Of a router with a cache service and the first worker."""
    common = {"redis_url": redis_server.url, "port": 0}
    router = RouterServer(RouterSettings(model=str(default_model_path()), **common))
    async with contextlib.AsyncExitStack() as stack:
        for server in (OriginalsServer(OriginalsSettings(**common)), workers[0], router):
            address = await server.start()
            stack.push_async_callback(server.stop)
        yield Stub(await stack.enter_async_context(open_channel(address)))
        await workers[1].stop()


async def opened(client: Stub) -> str:
    return (await client.OpenSession(generate_pb2.OpenSessionRequest())).session_id


async def holder(client: Stub, session: str) -> str:
    listed = (await client.ListSessions(generate_pb2.ListSessionsRequest())).sessions
    return next(info.worker for info in listed if info.session_id == session)


async def stream(client: Stub, session: str, prompt: str, heard: list[int]) -> None:
    """A greedy stream of NEW tokens into `heard`."""
    request = generate_pb2.GenerateRequest(
        prompt=prompt,
        session_id=session,
        sampling=common_pb2.SamplingParams(temperature=0),
        stop=common_pb2.StopParams(max_new_tokens=NEW, ignore_eos=True),
    )
    async for reply in client.Generate(request, timeout=120):
        if reply.HasField("token"):
            assert reply.token.index == len(heard)
            heard.append(reply.token.token_id)
    assert len(heard) == NEW


@contextlib.contextmanager
def slowed(loaded: LoadedModel) -> Iterator[None]:
    handle = loaded.model.register_forward_pre_hook(lambda *_: time.sleep(PAUSE_S))
    try:
        yield
    finally:
        handle.remove()


async def test_a_drained_worker_hands_over(
    client: Stub, redis: Redis, workers: list[WorkerServer], shallow_smollm2: LoadedModel
) -> None:
    expected: list[int] = []
    later: list[int] = []
    whole = await opened(client)
    await stream(client, whole, STORY, expected)
    await stream(client, whole, STORY, later)
    idle, running, heard = await opened(client), await opened(client), []
    await stream(client, idle, STORY, [])
    with slowed(shallow_smollm2):
        task = asyncio.create_task(stream(client, running, STORY, heard))
        while len(heard) < 4:
            assert not task.done()
            await asyncio.sleep(0.01)
        staying = await workers[1].start()
        leaving = await holder(client, running)
        told = await asyncio.to_thread(qaq, "drain", leaving)
    assert (told.returncode, told.stdout) == (
        0,
        "Moved 1 running generations. The process can be stopped now.\n",
    ), told.stderr
    await task
    assert heard == expected

    members = await Registry(redis).members("worker")
    assert {member.address: member.draining for member in members} == {staying: False, leaving: True}
    assert await holder(client, running) == staying
    moved: list[int] = []
    await stream(client, idle, STORY, moved)  # an idle session is taken up there as well
    assert moved == later
    assert await holder(client, idle) == staying
