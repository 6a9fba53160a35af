"""A stack of real processes whose parts a test may kill."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from qaq.v1 import generate_pb2_grpc

from qaq_core.models.default_model import default_model_path
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import RouterSettings
from services.router.server import RouterServer
from tests.faults.processes import Processes

PAGE_TOKENS = 16


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(EmbeddedRedis(persist=True))
        made = Processes(redis, tmp_path_factory.mktemp("faults"))
        stack.callback(made.stop)
        yield made


@pytest.fixture
async def client(processes: Processes) -> AsyncIterator[generate_pb2_grpc.InferenceStub]:
    """Of a router in this process."""
    settings = RouterSettings(redis_url=processes.redis.url, port=0, model=str(default_model_path()))
    router = RouterServer(settings)
    address = await router.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield generate_pb2_grpc.InferenceStub(channel)
    await router.stop()
