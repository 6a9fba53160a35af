"""A worker over real gRPC, with its originals in a real cache service and a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from pydantic import SecretStr
from qaq.v1 import common_pb2, originals_pb2, originals_pb2_grpc, worker_pb2, worker_pb2_grpc
from redis.asyncio import Redis

from qaq_core import ModelLoadError
from qaq_core.models import LoadedModel
from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.redis import RedisUnreachableError
from services.common.registry import Registry
from services.common.secret import SecretMissingError
from services.common.server import PortTakenError
from services.common.settings import OriginalsSettings, WorkerSettings
from services.originals.server import OriginalsServer
from services.worker import server as server_module
from services.worker.server import WorkerServer
from tests.services.worker.conftest import EXACT, request
from tests.shallow import LAYERS

TEXT = (
    "The harbour master counted the boats that came back before the storm, and wrote their names in a ledger: "
    "the Heron, the Petrel, the Kittiwake, the Dunlin, the Curlew. "
)


@pytest.fixture
async def cache_service(redis: Redis, redis_server: EmbeddedRedis) -> AsyncIterator[str]:
    server = OriginalsServer(OriginalsSettings(redis_url=SecretStr(redis_server.url)))
    yield await server.start()
    await server.stop()


@pytest.fixture
async def worker(
    cache_service: str, redis_server: EmbeddedRedis, smollm2: LoadedModel
) -> AsyncIterator[worker_pb2_grpc.WorkerStub]:
    settings = WorkerSettings(model="smollm2", redis_url=SecretStr(redis_server.url), max_sequences=2)
    server = WorkerServer(settings, loaded=smollm2)
    channel = open_channel(await server.start())
    yield worker_pb2_grpc.WorkerStub(channel)
    await channel.close()
    await server.stop()


async def describe(worker: worker_pb2_grpc.WorkerStub) -> worker_pb2.DescribeReply:
    return await worker.Describe(worker_pb2.DescribeRequest(), timeout=10)


async def test_run_with_remote_originals(
    worker: worker_pb2_grpc.WorkerStub, cache_service: str, smollm2: LoadedModel
) -> None:
    tokens = smollm2.tokenizer.encode(TEXT * 6)
    replies = [reply async for reply in worker.Run(request(tokens, 48, session_id="s"), timeout=240)]
    kinds = [kind for reply in replies if (kind := reply.WhichOneof("event")) != "pages"]
    assert kinds == ["prefill"] * kinds.count("prefill") + ["token"] * 48 + ["finished"]
    usage = replies[-1].finished.usage
    assert (usage.prompt_tokens, usage.generated_tokens) == (len(tokens), 48)
    # Exceptions fired, and all but those on staged tokens were answered over gRPC from rows in Redis.
    assert usage.cache.exceptions > 0
    assert usage.cache.rows_requantized > 0
    assert usage.cache.originals_missing == 0
    async with open_channel(cache_service) as channel:
        stats = await originals_pb2_grpc.OriginalsStub(channel).Stats(originals_pb2.StatsRequest(), timeout=10)
    assert stats.pages == (len(tokens) + 47) // 32
    assert stats.redis_row_reads > 0
    assert stats.rows_requantized > 0


async def test_statuses(worker: worker_pb2_grpc.WorkerStub) -> None:
    bad = {
        "token_ids": request([]),
        "vocabulary": request([99999999]),
        "temperature": request([1], sampling=common_pb2.SamplingParams(temperature=-1)),
        "preset": request([1], cache=common_pb2.CacheParams(preset="zip")),
    }
    for sentence, message in bad.items():
        with pytest.raises(grpc.aio.AioRpcError) as error:
            [reply async for reply in worker.Run(message, timeout=30)]
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert sentence in error.value.details()
    assert [reply async for reply in worker.Run(request([1, 2, 3], 1, cache=EXACT), timeout=60)]


async def test_a_cancelled_call_frees_its_sequence(worker: worker_pb2_grpc.WorkerStub) -> None:
    call = worker.Run(request([1, 2, 3], 4000, cache=EXACT), timeout=120)
    await call.read()
    assert (await describe(worker)).running == 1
    call.cancel()
    while (await describe(worker)).running:  # noqa: ASYNC110 (it is asked over gRPC)
        await asyncio.sleep(0.02)
    state = await describe(worker)
    assert (state.waiting, state.sessions, state.kv_bytes) == (0, 0, 0)


async def test_a_passed_deadline_frees_its_sequence(worker: worker_pb2_grpc.WorkerStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        [reply async for reply in worker.Run(request([1, 2, 3], 8000, cache=EXACT), timeout=1)]
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    while (await describe(worker)).running:  # noqa: ASYNC110 (it is asked over gRPC)
        await asyncio.sleep(0.02)


async def test_a_deadline_that_passes_in_a_pause(
    cache_service: str, redis_server: EmbeddedRedis, smollm2: LoadedModel
) -> None:
    server = WorkerServer(WorkerSettings(model="smollm2", redis_url=SecretStr(redis_server.url)), loaded=smollm2)
    async with open_channel(await server.start()) as channel:
        worker = worker_pb2_grpc.WorkerStub(channel)
        goes_on = worker.Run(request([1, 2, 3], 4000, cache=EXACT), timeout=240)
        gives_way = worker.Run(request([4, 5, 6], 4000, cache=EXACT), timeout=5)
        for call in (goes_on, gives_way):
            while (await call.read()).WhichOneof("event") != "token":
                pass
        assert server.scheduler is not None
        server.scheduler.set_budget((await describe(worker)).kv_bytes - 1)
        while not (await describe(worker)).waiting:  # noqa: ASYNC110 (it is asked over gRPC)
            await asyncio.sleep(0.02)
        with pytest.raises(grpc.aio.AioRpcError) as error:  # noqa: PT012 (until it ends)
            while True:
                await gives_way.read()
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        while (await describe(worker)).waiting:  # noqa: ASYNC110 (it is asked over gRPC)
            await asyncio.sleep(0.02)
        assert (await describe(worker)).running == 1
        assert (await goes_on.read()).WhichOneof("event") == "token"
    await server.stop()


async def test_describe_and_drop(worker: worker_pb2_grpc.WorkerStub, smollm2: LoadedModel) -> None:
    model = (await describe(worker)).model
    assert (model.name, model.fingerprint) == (smollm2.name, smollm2.fingerprint)
    assert (model.layers, model.query_heads, model.kv_heads, model.head_dim) == (LAYERS, 9, 3, 64)
    assert (model.context_length, model.vocab_size, model.dtype) == (8192, 49152, "float32")
    assert model.has_chat_template
    assert list(model.eos_token_ids) == [2]
    kept = request([5, 6, 7, 8], 2, cache=EXACT, session_id="s", keep=True)
    assert [reply async for reply in worker.Run(kept, timeout=60)]
    state = await describe(worker)
    assert (state.sessions, state.running) == (1, 0)
    assert state.kv_bytes > 0
    for existed in (True, False):
        assert (await worker.Drop(worker_pb2.DropRequest(session_id="s"), timeout=10)).existed is existed


async def test_listed_while_it_runs(redis: Redis, redis_server: EmbeddedRedis, smollm2: LoadedModel) -> None:
    server = WorkerServer(WorkerSettings(model="smollm2", redis_url=SecretStr(redis_server.url)), loaded=smollm2)
    registry = Registry(redis)
    assert await registry.members("worker") == []
    address = await server.start()
    assert [member.address for member in await registry.members("worker")] == [address]
    assert server.progress == ("ready", 1.0)
    await server.stop()
    assert await registry.members("worker") == []


async def test_draining_hands_over_what_runs(
    cache_service: str, redis: Redis, redis_server: EmbeddedRedis, smollm2: LoadedModel
) -> None:
    settings = WorkerSettings(model="smollm2", redis_url=SecretStr(redis_server.url), page_tokens=16)
    server = WorkerServer(settings, loaded=smollm2)
    tokens = smollm2.tokenizer.encode(TEXT)
    async with open_channel(await server.start()) as channel:
        worker = worker_pb2_grpc.WorkerStub(channel)
        call = worker.Run(request(tokens, 4000, cache=EXACT), timeout=120)
        while (await call.read()).WhichOneof("event") != "token":
            pass
        assert (await worker.Drain(worker_pb2.DrainRequest(), timeout=60)).moved == 1
        (member,) = await Registry(redis).members("worker")
        assert member.draining
        told: list[bytes] = []
        with pytest.raises(grpc.aio.AioRpcError) as ended:  # noqa: PT012 (until it ends)
            while True:
                told += (await call.read()).pages.ids
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert len(told) >= len(tokens) // 16
        assert len([key async for key in redis.scan_iter("qaq:page:*")]) >= len(told)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await worker.Run(request(tokens, 1), timeout=30).read()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        state = await describe(worker)
        assert (state.sessions, state.running, state.waiting) == (0, 0, 0)
    await server.stop()
    assert await Registry(redis).members("worker") == []


async def test_what_keeps_it_from_starting(
    redis: Redis, redis_server: EmbeddedRedis, smollm2: LoadedModel, tmp_path: Path
) -> None:
    url = SecretStr(redis_server.url)
    with pytest.raises(RedisUnreachableError):
        await WorkerServer(WorkerSettings(model="x", redis_url=SecretStr("redis://127.0.0.1:9/0"))).start()
    with pytest.raises(SecretMissingError, match="QAQ_SECRET"):
        await WorkerServer(WorkerSettings(model="x", redis_url=url, host="0.0.0.0")).start()
    with pytest.raises(ModelLoadError, match="is not there"):
        await WorkerServer(WorkerSettings(model=str(tmp_path / "no.gguf"), redis_url=url)).start()
    first = WorkerServer(WorkerSettings(model="x", redis_url=url), loaded=smollm2)
    port = int((await first.start()).rpartition(":")[2])
    with pytest.raises(PortTakenError):
        await WorkerServer(WorkerSettings(model="x", redis_url=url, port=port), loaded=smollm2).start()
    await first.stop()
    assert await Registry(redis).members("worker") == []


async def test_one_that_retires_finishes_what_runs_and_what_still_comes(
    cache_service: str, redis: Redis, redis_server: EmbeddedRedis, smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "SETTLED_S", 0.5)
    server = WorkerServer(WorkerSettings(model="smollm2", redis_url=SecretStr(redis_server.url)), loaded=smollm2)
    tokens = smollm2.tokenizer.encode(TEXT)
    async with open_channel(await server.start()) as channel:
        worker = worker_pb2_grpc.WorkerStub(channel)
        call = worker.Run(request(tokens, 4000, cache=EXACT), timeout=120)
        while (await call.read()).WhichOneof("event") != "token":
            pass
        assert not await server.retire(0.2)  # it still runs
        (member,) = await Registry(redis).members("worker")
        assert (member.retiring, member.draining) == (True, False)
        retired = asyncio.create_task(server.retire(120))
        late = [reply.WhichOneof("event") async for reply in worker.Run(request(tokens, 2, cache=EXACT), timeout=60)]
        assert late.count("token") == 2
        assert not retired.done()
        call.cancel()
        assert await retired
    await server.stop()
