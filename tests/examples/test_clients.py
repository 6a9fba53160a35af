"""The examples that talk to servers: a whole stack with the demo model, over real gRPC and HTTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from qaq_core.models import LoadedModel
from qaq_core.models.default_model import default_model_path
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings
from services.gateway.server import GatewayServer
from services.originals.server import OriginalsServer
from services.router.server import RouterServer
from services.worker.server import WorkerServer

from .conftest import Run

pytestmark = [pytest.mark.model, pytest.mark.redis]


@pytest.fixture
async def stack(redis: Redis, redis_server: EmbeddedRedis, smollm2: LoadedModel) -> AsyncIterator[tuple[str, str]]:
    """Addresses of a router and a gateway in this process."""
    common = {"redis_url": redis_server.url, "port": 0}
    originals = OriginalsServer(OriginalsSettings(**common))
    await originals.start()
    worker = WorkerServer(WorkerSettings(model="smollm2", **common), smollm2)
    await worker.start()
    router = RouterServer(RouterSettings(model=str(default_model_path()), **common))
    routing = await router.start()
    gateway = GatewayServer(GatewaySettings(**common))
    serving = await gateway.start()
    yield routing, serving
    for server in (gateway, router, worker, originals):
        await server.stop()


async def test_grpc_client(stack: tuple[str, str], run: Run) -> None:
    said = await asyncio.to_thread(run, "grpc_client", "--router", stack[0], "--max-new-tokens", 6)
    assert "The capital of France is Paris" in said
    assert re.findall(r"\[(\d+) tokens, the first after \d+ ms", said) == ["6", "6"]


async def test_openai_client(stack: tuple[str, str], run: Run) -> None:
    said = await asyncio.to_thread(run, "openai_client", "--url", f"http://{stack[1]}/v1", "--max-tokens", 12)
    assert "Paris" in said
    assert re.search(r"\[\d+ \+ \d+ tokens\]", said)
