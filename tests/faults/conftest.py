"""A stack of real processes whose parts a test may kill."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from qaq.v1 import generate_pb2_grpc

from qaq_core.models.default_model import default_model_path
from services.common.embedded_redis import EmbeddedRedis, free_port
from services.common.settings import RouterSettings
from services.router.server import RouterServer
from tests.faults.processes import Processes

PAGE_TOKENS = 16
DISK_BYTES = 384 << 20
# Not part of `make test`: they start many processes, or wait for what a network does.
LONG = frozenset({"test_clients.py", "test_full_redis.py", "test_network.py", "test_ray.py"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("QAQ_FAULTS") == "long":
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name in LONG:
            item.add_marker(pytest.mark.skip(reason="make faults, or QAQ_FAULTS=long, runs it"))


@dataclass
class Stack:
    processes: Processes
    cache_service: str
    workers: list[str]
    metrics: list[int]
    """The workers' ports."""


@pytest.fixture(scope="package")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small one, if it may be mounted."""
    path = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run(command, check=True, capture_output=True)
    yield path
    if path.is_mount():
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="package")
def stack(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One cache service and two workers over a Redis whose data is on that disk.

    test_chaos.py stops one of them for a while; the tests of test_processes.py kill one of each, in order;
    test_redis.py takes what is left.
    """
    with contextlib.ExitStack() as opened:
        redis = EmbeddedRedis(persist=True)
        redis.directory = disk / "redis"
        redis.directory.mkdir()
        opened.enter_context(redis)
        processes = Processes(redis, tmp_path_factory.mktemp("faults"))
        opened.callback(processes.stop)
        settings = {"QAQ_PAGE_TOKENS": str(PAGE_TOKENS), "QAQ_PREFIX_RECOMPUTE_TOKENS": "1"}
        metrics = [free_port() for _ in range(2)]
        workers = [processes.start("worker", QAQ_METRICS_PORT=str(port), **settings) for port in metrics]
        cache_service = processes.start("originals")
        processes.until_serving(cache_service, *workers)
        yield Stack(processes, cache_service, workers, metrics)


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
