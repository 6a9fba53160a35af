"""Generations whose call broke off, over real gRPC: who waits for another call, for how long, and who does not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY
from qaq.v1 import worker_pb2, worker_pb2_grpc

from qaq_core.models import LoadedModel
from services.common.channel import open_channel
from services.common.server import GrpcServer
from services.worker.inspection import Inspector
from services.worker.scheduler.scheduler import Scheduler
from services.worker.service import WorkerService, model_info
from tests.services.worker.conftest import EXACT, STORY, Gate, Ids, MakeScheduler, expected, request, settled, until

NEW, AT = 20, 4
LONG = 4000


@contextlib.asynccontextmanager
async def serving(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, orphan_s: float = 600.0
) -> AsyncIterator[tuple[str, Scheduler]]:
    """A worker's service, and its scheduler."""
    async with make_scheduler(max_sequences=2) as scheduler:

        async def drain() -> int:
            return 0

        server = GrpcServer()
        service = WorkerService(scheduler, Inspector(scheduler, smollm2), model_info(smollm2), 2, orphan_s, drain)
        server.add("qaq.v1.Worker", worker_pb2_grpc.add_WorkerServicer_to_server, service)
        address = await server.start()
        try:
            yield address, scheduler
        finally:
            await server.stop(0)


def asked(tokens: list[int], fence: int, new: int = LONG, **fields: Any) -> worker_pb2.RunRequest:
    return request(tokens, new, cache=EXACT, session_id="s", fence=fence, **fields)


async def read(call: Any, count: int | None = None) -> list[int]:
    """So many tokens of a call, or all."""
    found: list[int] = []
    async for reply in call:
        if reply.HasField("token"):
            found.append(reply.token.token_id)
        if len(found) == count:
            break
    return found


async def lost(address: str, request: worker_pb2.RunRequest, then: Callable[[], None] = lambda: None) -> list[int]:
    """The first tokens that a router got before its connection broke; `then` happens between the two."""
    async with open_channel(address) as channel:
        found = await read(worker_pb2_grpc.WorkerStub(channel).Run(request, timeout=120), AT)
        then()
        return found


def lapsed() -> float:
    return REGISTRY.get_sample_value("qaq_orphans_lapsed_total") or 0.0


async def test_it_goes_on_for_the_next_call(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids, gate: Gate
) -> None:
    tokens = ids(STORY)
    gate.open()
    async with serving(make_scheduler, smollm2) as (address, scheduler), open_channel(address) as channel:
        first = await lost(address, asked(tokens, 1, NEW), gate.shut)  # it does not end before that is noticed
        await until(lambda: all(g.call.left for g in scheduler.batch.active))
        gate.open()
        assert scheduler.state.running == 1
        rest = asked([*tokens, *first], 2, NEW, generated_tokens=AT)
        found = await read(worker_pb2_grpc.WorkerStub(channel).Run(rest, timeout=120))
        assert first + found == expected(smollm2, tokens, NEW)
        await settled(scheduler, running=0, sessions=0)


async def test_it_ends_when_nobody_wants_it(make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids) -> None:
    """A router says so: of one that waits, and of one whose call still runs; but not of a later call."""
    tokens = ids(STORY)
    async with serving(make_scheduler, smollm2) as (address, scheduler), open_channel(address) as channel:
        stub, before = worker_pb2_grpc.WorkerStub(channel), lapsed()

        async def cancelled(fence: int, session: str = "s", tenant: str = "") -> None:
            await stub.Cancel(worker_pb2.CancelRequest(session_id=session, tenant=tenant, fence=fence), timeout=30)

        await lost(address, asked(tokens, 2))
        for other in ({"fence": 1}, {"fence": 9, "session": "another"}, {"fence": 9, "tenant": "another"}):
            await cancelled(**other)
        assert (await settled(scheduler, running=1)).sessions == 1
        await cancelled(2)
        await settled(scheduler, running=0, sessions=0, kv_bytes=0)
        call = stub.Run(asked(tokens, 3), timeout=120)
        await read(call, 1)
        await cancelled(3)
        await settled(scheduler, running=0, sessions=0, kv_bytes=0)
        call.cancel()
        assert lapsed() == before


async def test_it_ends_after_a_while(make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids) -> None:
    before = lapsed()
    async with serving(make_scheduler, smollm2, orphan_s=0.1) as (address, scheduler):
        await lost(address, asked(ids(STORY), 1))
        await settled(scheduler, running=0, sessions=0, kv_bytes=0)
        await until(lambda: lapsed() == before + 1)


@pytest.mark.parametrize("fields", [{"fence": 0}, {"fence": 1, "choices": 2}])
async def test_what_nobody_can_take_over_ends_at_once(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids, fields: dict[str, Any]
) -> None:
    async with serving(make_scheduler, smollm2) as (address, scheduler):
        await lost(address, asked(ids(STORY), **fields))
        await settled(scheduler, running=0, sessions=0, kv_bytes=0)


async def test_without_patience_every_call_ends_at_once(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids
) -> None:
    async with serving(make_scheduler, smollm2, orphan_s=0) as (address, scheduler):
        await lost(address, asked(ids(STORY), 1))
        await settled(scheduler, running=0, sessions=0, kv_bytes=0)


async def test_calls_that_are_left_and_cancelled_at_any_moment_leave_nothing(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids
) -> None:
    """As a router does it: it cancels its call, and says so in another one."""
    tokens = ids(STORY)
    async with serving(make_scheduler, smollm2) as (address, scheduler), open_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        for fence in range(1, 21):
            call = stub.Run(asked(tokens, fence), timeout=120)
            reading = asyncio.create_task(read(call))
            await asyncio.sleep(0.004 * (fence % 6))
            call.cancel()
            await stub.Cancel(worker_pb2.CancelRequest(session_id="s", fence=fence), timeout=30)
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await reading
            await settled(scheduler, running=0, waiting=0, sessions=0)


async def test_a_call_that_comes_after_its_cancellation_begins_nothing(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids
) -> None:
    """Its session may be closed: a cache that it left behind would stay."""
    async with serving(make_scheduler, smollm2) as (address, scheduler), open_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        await stub.Cancel(worker_pb2.CancelRequest(session_id="s", fence=2), timeout=60)
        for fence in (1, 2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read(stub.Run(asked(ids(STORY), fence, AT), timeout=120))
            assert caught.value.code() is grpc.StatusCode.ABORTED
        assert not scheduler.state.sessions
        assert len(await read(stub.Run(asked(ids(STORY), 3, AT), timeout=120))) == AT
