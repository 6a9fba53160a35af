"""A stack of real processes whose parts a test may kill."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from qaq.v1 import generate_pb2_grpc

from qaq_core.models.default_model import default_model_path
from services.cluster.stack import python_path
from services.common.embedded_redis import EmbeddedRedis, free_port
from services.common.settings import RouterSettings
from services.router.server import RouterServer

START_TIMEOUT_S = 240.0
PAGE_TOKENS = 16


class Processes:
    """Cache services and workers by address, over one Redis."""

    def __init__(self, redis: EmbeddedRedis, directory: Path) -> None:
        self.redis = redis
        self._directory = directory
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, role: str, **environment: str) -> str:
        """Starts one. Returns its address; it may not serve yet."""
        port = free_port()
        address = f"127.0.0.1:{port}"
        given = {"QAQ_REDIS_URL": self.redis.url, "QAQ_MODEL": str(default_model_path())} | environment
        with open(self._directory / f"{role}-{port}.log", "wb") as log:
            self._running[address] = subprocess.Popen(
                [sys.executable, "-m", "services.cli", role, "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": python_path()} | given,
            )
        return address

    def until_serving(self, *addresses: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        for address in addresses:
            with grpc.insecure_channel(address) as channel:
                grpc.channel_ready_future(channel).result(deadline - time.monotonic())

    def kill(self, address: str) -> None:
        """As a crash does: nothing is told to anybody."""
        process = self._running.pop(address)
        process.kill()
        process.wait(30)

    def stop(self) -> None:
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait(30)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with contextlib.ExitStack() as stack:
        made = Processes(stack.enter_context(EmbeddedRedis()), tmp_path_factory.mktemp("faults"))
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
