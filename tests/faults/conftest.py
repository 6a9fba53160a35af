"""A stack of real processes whose parts a test may kill."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from qaq.v1 import generate_pb2_grpc

from qaq_core.models.default_model import default_model_path
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import RouterSettings
from services.router.server import RouterServer
from tests.faults.processes import Processes

PAGE_TOKENS = 16
# Not part of `make test`: they start many processes, or wait for what a network does.
LONG = frozenset({"test_clients.py", "test_full_redis.py", "test_network.py", "test_ray.py"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("QAQ_FAULTS") == "long":
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name in LONG:
            item.add_marker(pytest.mark.skip(reason="make faults, or QAQ_FAULTS=long, runs it"))


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
