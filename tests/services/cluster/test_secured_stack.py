"""One server of each kind with the certificates, roles and Redis users that a stack makes for itself."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx2
import pytest
from qaq.v1 import generate_pb2, generate_pb2_grpc, originals_pb2, originals_pb2_grpc, worker_pb2, worker_pb2_grpc

from qaq_core.models import LoadedModel
from services.cluster.access import Access
from services.cluster.status import addresses, stack_status
from services.common import identity as identity_module
from services.common.certificates import issue
from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings
from services.gateway.server import GatewayServer
from services.originals.server import OriginalsServer
from services.router.server import RouterServer
from services.worker.server import WorkerServer

pytestmark = [pytest.mark.redis, pytest.mark.slow]

LONG = {"max_new_tokens": 60, "ignore_eos": True}


@dataclass
class Secured:
    access: Access
    certificates: Path
    originals: str
    worker: str
    router: str
    gateway: str


@pytest.fixture
async def stack(
    smollm2: LoadedModel, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Secured]:
    monkeypatch.setattr(identity_module, "CHECK_S", 0.0)
    certificates = tmp_path / "tls"
    issue(certificates)
    async with contextlib.AsyncExitStack() as running:
        redis = running.enter_context(EmbeddedRedis())
        access = Access(redis=redis.state(), certificates=certificates)
        worker = WorkerSettings(model="smollm2", page_tokens=16, **access.settings("worker"))
        router = RouterSettings(model=str(model_path), port=0, client_certificates=True, **access.settings("router"))
        servers = (
            OriginalsServer(OriginalsSettings(**access.settings("originals"))),
            WorkerServer(worker, smollm2),
            RouterServer(router),
            GatewayServer(GatewaySettings(port=0, **access.settings("gateway"))),
        )
        found = []
        for server in servers:
            found.append(await server.start())
            running.push_async_callback(server.stop)
        yield Secured(access, certificates, *found)


async def test_it_serves_stores_and_is_looked_after(stack: Secured) -> None:
    operator = stack.access.identity("operator")
    verified = httpx2.AsyncClient(verify=str(stack.certificates / "ca.pem"), timeout=60)
    async with verified, open_channel(stack.router, stack.access.identity("client"), "router") as channel:
        client = generate_pb2_grpc.InferenceStub(channel)
        asked = {"model": "", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        asked["model"] = (await verified.get(f"https://{stack.gateway}/v1/models")).json()["data"][0]["id"]
        answer = await verified.post(f"https://{stack.gateway}/v1/completions", json=asked)
        assert "Paris" in answer.json()["choices"][0]["text"]
        session = (await client.OpenSession(generate_pb2.OpenSessionRequest())).session_id
        request = generate_pb2.GenerateRequest(prompt="Once upon a time", session_id=session, stop=LONG)
        replies = [reply async for reply in client.Generate(request)]
        assert replies[-1].finished.usage.generated_tokens == 60
        assert len((await client.ListSessions(generate_pb2.ListSessionsRequest())).sessions) == 1
        await client.CloseSession(generate_pb2.CloseSessionRequest(session_id=session))
    async with open_channel(stack.originals, operator, "originals") as channel:
        stats = await originals_pb2_grpc.OriginalsStub(channel).Stats(originals_pb2.StatsRequest())
        assert stats.pages > 0
    shown = await stack_status(stack.access)
    assert list(shown.workers) == [stack.worker]
    assert all(shown.workers.values())
    assert await addresses(stack.access) == {stack.originals, stack.worker, stack.router, stack.gateway}
    async with open_channel(stack.worker, operator, "worker") as channel:
        await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest())


async def test_a_stream_outlives_the_renewal_of_all_certificates(stack: Secured) -> None:
    async with open_channel(stack.router, stack.access.identity("client"), "router") as channel:
        client = generate_pb2_grpc.InferenceStub(channel)
        call = client.Generate(generate_pb2.GenerateRequest(prompt="Once upon a time", stop=LONG))
        replies = aiter(call)
        while (await anext(replies)).WhichOneof("event") != "token":
            pass
        shutil.rmtree(stack.certificates)
        issue(stack.certificates)
        short = generate_pb2.GenerateRequest(prompt="The capital of France is", stop={"max_new_tokens": 4})
        second = [reply async for reply in client.Generate(short)]
        rest = [reply async for reply in replies]
    assert second[-1].finished.usage.generated_tokens == 4
    assert rest[-1].finished.usage.generated_tokens == 60


async def test_a_stolen_credential_of_a_worker_opens_little(stack: Secured) -> None:
    thief = stack.access.identity("worker")
    async with contextlib.AsyncExitStack() as open_:
        router = await open_.enter_async_context(open_channel(stack.router, thief, "router"))
        worker = await open_.enter_async_context(open_channel(stack.worker, thief, "worker"))
        calls = [
            generate_pb2_grpc.InferenceStub(router).ListSessions(generate_pb2.ListSessionsRequest()),
            worker_pb2_grpc.WorkerStub(worker).Drain(worker_pb2.DrainRequest()),
            worker_pb2_grpc.WorkerStub(worker).Describe(worker_pb2.DescribeRequest()),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
