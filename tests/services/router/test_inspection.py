"""Watching caches through a router: whose they are, how often, where they go, and what they cost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from qaq.v1 import generate_pb2, generate_pb2_grpc, inspect_pb2, inspect_pb2_grpc
from redis.asyncio import Redis

from services.common.keys import WithMetadata, authorization
from services.common.settings import RouterSettings
from services.router import inspection, session_keys
from tests.services.tenancy import Tenancy

from .conftest import CountingWorker, router_channel, running_worker
from .test_service import replies, request

Code = grpc.StatusCode
VIEW = inspect_pb2.CacheView(cached=3, total=4)


def inspector(channel: grpc.aio.Channel, key: str = "") -> Any:
    return WithMetadata(inspect_pb2_grpc.InspectorStub(channel), authorization(key) if key else ())


async def opened(channel: grpc.aio.Channel, key: str = "") -> str:
    """A session with a cache on the worker."""
    stub = WithMetadata(generate_pb2_grpc.InferenceStub(channel), authorization(key) if key else ())
    session = (await stub.OpenSession(generate_pb2.OpenSessionRequest())).session_id
    await replies(stub.Generate(request(session_id=session)))
    return str(session)


async def refused(call: Any, code: Code, words: str = "") -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    assert caught.value.code() is code, caught.value
    assert words in (caught.value.details() or "")


async def test_a_watch_tells_what_changes(channel: grpc.aio.Channel, worker: CountingWorker) -> None:
    stub = inspector(channel)
    session = await opened(channel)
    watch = stub.WatchCache(inspect_pb2.WatchCacheRequest(session_id=session, options={"tokens": 7, "columns": 5}))
    first = await watch.read()
    assert (first.worker, first.moves, first.HasField("view"), first.unreachable) == (worker.address, 0, False, False)
    worker.view = inspect_pb2.CacheView(cached=3, total=4, text=[{"token_id": 1}] * 4)
    assert (await watch.read()).view.cached == 3
    worker.view = inspect_pb2.CacheView(cached=9, total=9, text_first=4)
    assert (await watch.read()).view.cached == 9
    assert {(asked.options.tokens, asked.options.columns) for asked in worker.inspected} == {(7, 5)}
    assert {asked.known_text for asked in worker.inspected} == {0, 4}  # what was told is not told again
    looks = len(worker.inspected)
    worker.view = inspect_pb2.CacheView(cached=9, total=2)  # the text was cut
    assert (await watch.read()).view.total == 2
    worker.view = inspect_pb2.CacheView(cached=1, total=2, text=[{"token_id": 1}] * 2)
    assert len((await watch.read()).view.text) == 2
    assert worker.inspected[-1].known_text in (0, 2)
    assert len(worker.inspected) > looks
    await generate_pb2_grpc.InferenceStub(channel).CloseSession(generate_pb2.CloseSessionRequest(session_id=session))
    await refused(watch, Code.NOT_FOUND, session)


async def test_a_watch_keeps_to_its_interval_and_ends_with_its_caller(
    channel: grpc.aio.Channel, worker: CountingWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    real = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await real(0.01)

    monkeypatch.setattr(inspection.asyncio, "sleep", noted)
    monkeypatch.setattr(inspection, "SILENCE_S", 0.05)
    worker.view = VIEW
    stub, session = inspector(channel), await opened(channel)
    watch = stub.WatchCache(inspect_pb2.WatchCacheRequest(session_id=session, interval_s=3))
    for _ in range(3):  # nothing changes, and it says that it goes on
        assert (await watch.read()).view == VIEW
    assert 3 in slept
    watch.cancel()
    for _ in range(200):
        looks = len(worker.inspected)
        await real(0.05)
        if len(worker.inspected) == looks:
            return
    raise AssertionError("the watch goes on without its caller")


async def test_a_session_that_moves_is_followed(
    channel: grpc.aio.Channel, worker: CountingWorker, redis: Redis
) -> None:
    worker.view = VIEW
    stub, session = inspector(channel), await opened(channel)
    watch = stub.WatchCache(inspect_pb2.WatchCacheRequest(session_id=session))
    assert (await watch.read()).worker == worker.address
    await redis.hset(session_keys.facts(session), "worker", "127.0.0.1:1")
    lost = await watch.read()
    assert (lost.worker, lost.moves, lost.unreachable, lost.HasField("view")) == ("127.0.0.1:1", 1, True, False)
    async with running_worker(redis) as other:
        other.view = inspect_pb2.CacheView(cached=5, total=5)
        await redis.hset(session_keys.facts(session), "worker", other.address)
        while not (report := await watch.read()).HasField("view"):
            assert report.worker in ("127.0.0.1:1", other.address)  # the router has not heard of it yet
        assert (report.worker, report.moves, report.view.cached) == (other.address, 2, 5)


async def test_a_price_is_kept_for_the_next_turns(
    channel: grpc.aio.Channel, worker: CountingWorker, redis: Redis
) -> None:
    stub, inference = inspector(channel), generate_pb2_grpc.InferenceStub(channel)
    asked = inspect_pb2.SetPrecisionRequest
    empty = (await inference.OpenSession(generate_pb2.OpenSessionRequest())).session_id
    await refused(stub.SetPrecision(asked(session_id=empty, lambda_floor=1)), Code.FAILED_PRECONDITION, "a prompt")
    session = await opened(channel)
    await refused(stub.SetPrecision(asked(session_id=session, lambda_floor=1)), Code.FAILED_PRECONDITION, "a prompt")
    worker.view = VIEW
    reply = await stub.SetPrecision(asked(session_id=session, target_bits=2.5))
    assert reply.lambda_floor == 0.25
    assert worker.floors[-1].target_bits == 2.5
    await replies(inference.Generate(request(session_id=session)))
    assert worker.asked[-1].lambda_floor == 0.25
    branch = (await inference.OpenSession(generate_pb2.OpenSessionRequest(branch_of=session))).session_id
    await replies(inference.Generate(request(session_id=branch)))
    assert worker.asked[-1].lambda_floor == 0.25
    await stub.SetPrecision(asked(session_id=session, lambda_floor=2))
    assert worker.floors[-1].lambda_floor == 2
    for wrong, words in (
        ({"lambda_floor": -1.0}, "lambda_floor"),
        ({"lambda_floor": float("nan")}, "lambda_floor"),
        ({"lambda_floor": 1e7}, "lambda_floor"),
        ({"target_bits": 0.0}, "target_bits"),
        ({"target_bits": float("inf")}, "target_bits"),
    ):
        await refused(stub.SetPrecision(asked(session_id=session, **wrong)), Code.INVALID_ARGUMENT, words)
    await refused(stub.SetPrecision(asked(session_id="nobody", lambda_floor=1)), Code.NOT_FOUND)
    await inference.CloseSession(generate_pb2.CloseSessionRequest(session_id=session))
    assert not await redis.exists(session_keys.facts(session))


async def test_what_may_be_asked_for_is_bounded(
    channel: grpc.aio.Channel, worker: CountingWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.view = VIEW
    stub, session = inspector(channel), await opened(channel)
    watch, look = inspect_pb2.WatchCacheRequest, inspect_pb2.InspectCacheRequest
    for options in ({"tokens": 4097}, {"columns": 257}, {"tokens": -1}):
        name = next(iter(options))
        await refused(stub.InspectCache(look(session_id=session, options=options)), Code.INVALID_ARGUMENT, name)
        await refused(stub.WatchCache(watch(session_id=session, options=options)), Code.INVALID_ARGUMENT, name)
    for interval_s in (0.1, 61, -1, float("nan")):
        call = stub.WatchCache(watch(session_id=session, interval_s=interval_s))
        await refused(call, Code.INVALID_ARGUMENT, "interval_s")
    await refused(stub.InspectCache(look()), Code.INVALID_ARGUMENT, "session_id")
    monkeypatch.setattr(inspection, "MAX_WATCHES_OF_TENANT", 1)
    first = stub.WatchCache(watch(session_id=session))
    await first.read()
    await refused(stub.WatchCache(watch(session_id=session)), Code.RESOURCE_EXHAUSTED)
    first.cancel()
    for _ in range(100):
        second = stub.WatchCache(watch(session_id=session))
        try:
            assert (await second.read()).session_id == session  # there is room again
            return
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.05)
    raise AssertionError("a watch that ended is still counted")


async def test_a_cache_is_shown_to_its_tenant_and_without_its_text_to_an_operator(
    worker: CountingWorker, router_settings: RouterSettings, tmp_path: Path
) -> None:
    tenancy = Tenancy(tmp_path / "tenants.json")
    keys, worker.view = tenancy.keys, VIEW
    settings = router_settings.model_copy(update={"tenants_file": tenancy.path})
    async with router_channel(settings) as channel:
        session = await opened(channel, keys["ada"])
        look = inspect_pb2.InspectCacheRequest(session_id=session)
        floor = inspect_pb2.SetPrecisionRequest(session_id=session, lambda_floor=1)
        for name in ("nobody", ""):
            await refused(inspector(channel, keys.get(name, "")).InspectCache(look), Code.UNAUTHENTICATED)
        bob = inspector(channel, keys["bob"])
        await refused(bob.InspectCache(look), Code.NOT_FOUND)
        await refused(bob.WatchCache(inspect_pb2.WatchCacheRequest(session_id=session)), Code.NOT_FOUND)
        await refused(bob.SetPrecision(floor), Code.NOT_FOUND)
        assert not worker.inspected
        assert not worker.floors
        for name, known in (("ada", 0), ("root", -1)):
            assert (await inspector(channel, keys[name]).InspectCache(look)).view == VIEW
            assert (worker.inspected[-1].tenant, worker.inspected[-1].known_text) == ("ada", known)
            await inspector(channel, keys[name]).SetPrecision(floor)
            assert worker.floors[-1].tenant == "ada"
        budget = inspect_pb2.SetWorkerBudgetRequest(worker=worker.address, kv_budget_bytes=5 << 20)
        for asked in (bob.ListWorkers(inspect_pb2.ListWorkersRequest()), bob.SetWorkerBudget(budget)):
            await refused(asked, Code.PERMISSION_DENIED, "operator")
        root = inspector(channel, keys["root"])
        (listed,) = (await root.ListWorkers(inspect_pb2.ListWorkersRequest())).workers
        assert (listed.address, listed.max_sequences) == (worker.address, worker.max_sequences)
        await root.SetWorkerBudget(budget)
        assert worker.budgets == [5 << 20]
        budget.kv_budget_bytes = 100
        await refused(root.SetWorkerBudget(budget), Code.INVALID_ARGUMENT, "kv_budget_bytes")
        await refused(root.SetWorkerBudget(inspect_pb2.SetWorkerBudgetRequest(worker="x")), Code.NOT_FOUND)
