"""Fixtures that every room uses."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
from redis.asyncio import Redis

from qaq_core.models.loading import LoadedModel, default_model_path, load_model
from services.common.embedded_redis import EmbeddedRedis
from services.common.redis import connect

# The tests' tensors are small, and there are other processes: more threads wait for each other most of the time.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A real Redis server for the whole run."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
async def redis(redis_server: EmbeddedRedis) -> AsyncIterator[Redis]:
    """A client of an emptied database."""
    client = connect(redis_server.url)
    await client.flushdb()
    yield client
    await client.aclose()


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The demo model, float32 on the CPU. Shared: leave its weights and configuration as they are."""
    return load_model(str(default_model_path()))
