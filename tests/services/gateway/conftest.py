"""A gateway over real HTTP, in front of a real router, worker, model, originals store and Redis."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from redis.asyncio import Redis

from qaq_core.models import LoadedModel
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings
from services.gateway.server import GatewayServer
from services.originals.server import OriginalsServer
from services.router.server import RouterServer
from services.worker.server import WorkerServer


@dataclass
class Served:
    """A stack in this process: where its parts are, and its model's name."""

    url: str
    worker: str
    model: str


@contextlib.asynccontextmanager
async def running_stack(
    redis_server: EmbeddedRedis, loaded: LoadedModel, model_path: Path, **of_worker: Any
) -> AsyncIterator[Served]:
    """One server of each kind.

    Args:
        model_path: where the router finds the tokenizer.
        of_worker: its settings, where they differ.
    """
    common = {"redis_url": redis_server.url, "port": 0}
    worker = WorkerServer(WorkerSettings(**{"model": "smollm2", "preset": "fp16", **common, **of_worker}), loaded)
    gateway = GatewayServer(GatewaySettings(**common))
    # A worker that stops waits some seconds for a store to take its originals, so there is one.
    originals = OriginalsServer(OriginalsSettings(**common))
    router = RouterServer(RouterSettings(model=str(model_path), **common))
    async with contextlib.AsyncExitStack() as stack:
        addresses = []
        for server in (originals, worker, router, gateway):
            addresses.append(await server.start())
            stack.push_async_callback(server.stop)
        yield Served(f"http://{addresses[-1]}", addresses[1], loaded.name)


@pytest.fixture
async def served(
    redis: Redis, redis_server: EmbeddedRedis, smollm2: LoadedModel, model_path: Path
) -> AsyncIterator[Served]:
    async with running_stack(redis_server, smollm2, model_path) as stack:
        yield stack


@pytest.fixture
async def openai(served: Served) -> AsyncIterator[AsyncOpenAI]:
    """The official client."""
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client
