"""Sentinel makes another Redis the primary while streams run: none of them is lost."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from qaq.v1 import common_pb2, generate_pb2, generate_pb2_grpc
from redis import Redis as BlockingRedis
from redis.exceptions import RedisError

from services.common.embedded_redis import EmbeddedRedis, find_server, free_port
from services.common.redis import connect
from services.common.settings import RouterSettings

from .conftest import CountingWorker, running_router, running_worker

pytestmark = [pytest.mark.slow, pytest.mark.redis]
STREAMS, TOKENS = 6, 60


class Replicated:
    """A primary, a replica and a sentinel that watches them.

    Attributes:
        url: of the sentinel.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._binary = directory, find_server()[1]
        self.ports = [free_port(), free_port()]
        self._sentinel = free_port()
        self.url = f"redis+sentinel://127.0.0.1:{self._sentinel}/mymaster/0"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        first, second = self.ports
        self._run("first.conf", f"port {first}")
        self._run("second.conf", f"port {second}\nreplicaof 127.0.0.1 {first}")
        self._wait(lambda: self._client(1).info("replication")["master_link_status"] == "up")
        watch = f"""port {self._sentinel}
sentinel monitor mymaster 127.0.0.1 {first} 1
sentinel down-after-milliseconds mymaster 500
sentinel failover-timeout mymaster 3000"""
        self._run("sentinel.conf", watch, "--sentinel")
        sentinel = BlockingRedis(port=self._sentinel)
        self._wait(lambda: sentinel.sentinel_masters()["mymaster"]["num-slaves"] == 1)

    def kill_primary(self) -> None:
        self.processes[0].kill()

    def promoted(self) -> bool:
        with contextlib.suppress(RedisError):
            return bool(self._client(1).info("replication")["role"] == "master")
        return False

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _client(self, number: int) -> BlockingRedis:
        return BlockingRedis(port=self.ports[number])

    def _run(self, name: str, text: str, *options: str) -> None:
        path = self._directory / name
        path.write_text(f'bind 127.0.0.1\nsave ""\ndir {self._directory}\n{text}\n' if not options else text + "\n")
        quiet = subprocess.DEVNULL
        self.processes.append(subprocess.Popen([self._binary, path, *options], stdout=quiet, stderr=quiet))

    def _wait(self, holds: object) -> None:
        assert callable(holds)
        ends = time.monotonic() + 30
        while time.monotonic() < ends:
            with contextlib.suppress(RedisError, KeyError):
                if holds():
                    return
            time.sleep(0.05)
        raise AssertionError("Redis and its replica were not ready in time")


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[Replicated]:
    servers = Replicated(tmp_path)
    try:
        servers.start()
        yield servers
    finally:
        servers.stop()


@contextlib.asynccontextmanager
async def slow_worker(url: str) -> AsyncIterator[CountingWorker]:
    """One that waits for its gate before each token; the gate is shut most of the time."""
    redis = connect(url)
    try:
        async with running_worker(redis) as worker:
            yield worker
    finally:
        await redis.aclose()


async def generate(stub: generate_pb2_grpc.InferenceStub, session: str, received: list[list[int]]) -> None:
    request = generate_pb2.GenerateRequest(
        prompt="Hi", session_id=session, stop=common_pb2.StopParams(max_new_tokens=TOKENS, ignore_eos=True)
    )
    tokens: list[int] = []
    received.append(tokens)
    async for reply in stub.Generate(request, timeout=100):
        if reply.HasField("token"):
            tokens.append(reply.token.token_id)


async def test_streams_survive_a_failover_of_sentinel(replicated: Replicated, model_path: Path) -> None:
    settings = RouterSettings(redis_url=replicated.url, port=0, model=str(model_path))
    async with slow_worker(replicated.url) as worker, running_router(settings) as stub:
        opened = [await stub.OpenSession(generate_pb2.OpenSessionRequest()) for _ in range(STREAMS)]
        received: list[list[int]] = []
        async with asyncio.TaskGroup() as group:
            for session in opened:
                group.create_task(generate(stub, session.session_id, received))
            await _pass(worker, received, TOKENS // 4)
            replicated.kill_primary()
            while not replicated.promoted():
                await _pass(worker, received, min(map(len, received)) + 1)
            await _pass(worker, received, TOKENS // 2)
            worker.gate.set()
        assert [len(tokens) for tokens in received] == [TOKENS] * STREAMS
        assert all(tokens == list(range(tokens[0], tokens[0] + TOKENS)) for tokens in received)
        # The next turn sees the whole log, which is with the new primary.
        before = len(worker.asked)
        await generate(stub, opened[0].session_id, received)
        assert len(worker.asked) == before + 1
        assert worker.asked[-1].history_tokens == received[0][-1] + 1


async def _pass(worker: CountingWorker, received: list[list[int]], tokens: int) -> None:
    """Lets the streams go on until each has so many tokens, or a moment has passed."""
    worker.gate.set()
    for _ in range(40):
        await asyncio.sleep(0.005)
        if len(received) == STREAMS and min(map(len, received)) >= tokens:
            break
    worker.gate.clear()
    await asyncio.sleep(0.05)


def test_a_stack_finds_the_primary(replicated: Replicated) -> None:
    assert EmbeddedRedis(replicated.url).start().description.startswith("configured: redis+sentinel://127.0.0.1")
