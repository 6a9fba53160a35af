"""A router over real gRPC and Redis, in front of a worker whose answers a test can foresee."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from qaq.v1 import common_pb2, generate_pb2_grpc, inspect_pb2, worker_pb2, worker_pb2_grpc
from redis.asyncio import Redis

from qaq_core.models import default_model_path
from services.common.embedded_redis import EmbeddedRedis
from services.common.redis import connect
from services.common.registry import Registry
from services.common.server import GrpcServer
from services.common.settings import RouterSettings
from services.router.hold import Hold
from services.router.server import RouterServer
from services.router.sessions import SessionDirectory

from .vllm import Stub

CONTEXT = 256


@dataclass
class CountingWorker(worker_pb2_grpc.WorkerServicer):
    """Answers a log of n tokens with the tokens n, n+1, …; waits at `gate` before each token after the first."""

    name: str = "counting"
    source: str = field(default_factory=lambda: str(default_model_path()))
    context: int = CONTEXT
    address: str = ""
    asked: list[worker_pb2.RunRequest] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    cancelled: list[tuple[str, int]] = field(default_factory=list)
    refuse: grpc.StatusCode | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    max_sequences: int = 8
    inspected: list[inspect_pb2.InspectRequest] = field(default_factory=list)
    floors: list[inspect_pb2.SetFloorRequest] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    view: inspect_pb2.CacheView | None = None

    async def Inspect(
        self, request: inspect_pb2.InspectRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.CacheView:
        self.inspected.append(request)
        if self.view is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no cache")
        return self.view

    async def SetFloor(
        self, request: inspect_pb2.SetFloorRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.SetFloorReply:
        self.floors.append(request)
        if self.view is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no cache")
        return inspect_pb2.SetFloorReply(lambda_floor=request.lambda_floor or 0.25)

    async def SetBudget(
        self, request: inspect_pb2.SetBudgetRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.SetBudgetReply:
        self.budgets.append(request.kv_budget_bytes)
        return inspect_pb2.SetBudgetReply()

    async def Run(
        self, request: worker_pb2.RunRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.RunReply]:
        if self.refuse is not None:
            await context.abort(self.refuse, "the queue is full")
        self.asked.append(request)
        total = len(request.token_ids)
        try:
            yield worker_pb2.RunReply(prefill=common_pb2.PrefillProgress(tokens_done=total, tokens_total=total))
            for index in range(request.stop.max_new_tokens):
                if index:
                    await self.gate.wait()
                yield worker_pb2.RunReply(token=common_pb2.Token(token_id=total + index, index=index, text="é "))
            usage = common_pb2.Usage(prompt_tokens=total, generated_tokens=request.stop.max_new_tokens)
            finished = common_pb2.Finished(reason=common_pb2.FINISH_REASON_LENGTH, usage=usage, text="end")
            yield worker_pb2.RunReply(finished=finished)
        finally:
            self.ended.append(request.session_id)

    async def Cancel(
        self, request: worker_pb2.CancelRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.CancelReply:
        self.cancelled.append((request.session_id, request.fence))
        return worker_pb2.CancelReply()

    async def Drop(self, request: worker_pb2.DropRequest, context: grpc.aio.ServicerContext) -> worker_pb2.DropReply:
        self.dropped.append(request.session_id)
        return worker_pb2.DropReply(existed=True)

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DescribeReply:
        model = common_pb2.ModelInfo(name=self.name, source=self.source, context_length=self.context, vocab_size=49152)
        return worker_pb2.DescribeReply(model=model, max_sequences=self.max_sequences)


@contextlib.asynccontextmanager
async def running_worker(
    redis: Redis, facts: Mapping[str, Any] | None = None, **of_worker: Any
) -> AsyncIterator[CountingWorker]:
    """One more worker, registered while the context lasts, with facts that may change."""
    worker = CountingWorker(**of_worker)
    worker.gate.set()
    server = GrpcServer()
    server.add("qaq.v1.Worker", worker_pb2_grpc.add_WorkerServicer_to_server, worker)
    worker.address = await server.start()
    try:
        async with Registry(redis).announce("worker", worker.address, lambda: facts or {}):
            yield worker
    finally:
        await server.stop(0)


@pytest.fixture
async def worker(redis: Redis) -> AsyncIterator[CountingWorker]:
    async with running_worker(redis) as worker:
        yield worker


@pytest.fixture
def router_settings(redis_server: EmbeddedRedis, model_path: Path) -> RouterSettings:
    return RouterSettings(redis_url=redis_server.url, port=0, model=str(model_path))


@contextlib.asynccontextmanager
async def router_channel(settings: RouterSettings) -> AsyncIterator[grpc.aio.Channel]:
    """A router, and a channel to it."""
    router = RouterServer(settings)
    address = await router.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield channel
    finally:
        await router.stop()


@contextlib.asynccontextmanager
async def running_router(settings: RouterSettings) -> AsyncIterator[generate_pb2_grpc.InferenceStub]:
    """A router and a client of it."""
    async with router_channel(settings) as channel:
        yield generate_pb2_grpc.InferenceStub(channel)


@pytest.fixture
async def client(
    worker: CountingWorker, router_settings: RouterSettings
) -> AsyncIterator[generate_pb2_grpc.InferenceStub]:
    """A client of a router in front of `worker`."""
    async with running_router(router_settings) as stub:
        yield stub


@pytest.fixture
def smg_settings(router_settings: RouterSettings) -> RouterSettings:
    return router_settings.model_copy(update={"smg": True})


@pytest.fixture
async def channel(worker: CountingWorker, smg_settings: RouterSettings) -> AsyncIterator[grpc.aio.Channel]:
    """To a router in front of `worker`."""
    async with router_channel(smg_settings) as channel:
        yield channel


@pytest.fixture
def engine(channel: grpc.aio.Channel) -> Stub:
    return Stub(channel)


@pytest.fixture
def maxmemory() -> str | None:
    """Of `own_server`; None is the default. A file of tests may say otherwise."""
    return None


@pytest.fixture
def own_server(maxmemory: str | None) -> Iterator[EmbeddedRedis]:
    """A Redis of one test alone, which keeps its data between `terminate` and `start`."""
    with EmbeddedRedis(maxmemory=maxmemory, persist=True) as server:
        yield server


@pytest.fixture
async def own_redis(own_server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = connect(own_server.url)
    yield client
    await client.aclose()


@pytest.fixture
def own_settings(own_server: EmbeddedRedis, model_path: Path) -> RouterSettings:
    """Of a router over it."""
    return RouterSettings(redis_url=own_server.url, port=0, model=str(model_path))


@contextlib.asynccontextmanager
async def opened(directory: SessionDirectory) -> AsyncIterator[Hold]:
    """A new session that a generation holds."""
    session = await directory.open("m", common_pb2.CacheParams(), kept=True)
    async with directory.held(session.id, lambda _: None) as hold:
        yield hold


@pytest.fixture
def directory(redis: Redis) -> SessionDirectory:
    return SessionDirectory(redis, ttl_s=60)
