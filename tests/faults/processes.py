"""Real processes that a test may kill and stop, over a Redis that it may break too."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grpc
import psutil
from redis.asyncio import Redis

from qaq_core.models.default_model import default_model_path
from qaq_eval.serving.chaos import Role, Stack, Victim
from services.cluster.stack import python_path
from services.common.embedded_redis import EmbeddedRedis, free_port

START_TIMEOUT_S = 240.0
STOP_S = 30.0
_COMMANDS = {"worker": "worker", "cache service": "originals", "router": "router"}


class Processes:
    """Roles as plain processes, by address.

    Args:
        directory: for their logs.
        environment: of each of them.
    """

    def __init__(self, redis: EmbeddedRedis, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        self.redis, self.model = redis, str(default_model_path())
        self._directory, self._environment = directory, dict(environment or {})
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, role: str, host: str = "127.0.0.1", inside: Sequence[str] = (), **environment: str) -> str:
        """Starts one. Returns its address; it may not serve yet.

        Args:
            role: the command of `qaq`.
            inside: a command that runs it, such as `ip netns exec`.
            environment: of this one.
        """
        port = free_port()
        address = f"{host}:{port}"
        given = {"QAQ_REDIS_URL": self.redis.url, "QAQ_MODEL": self.model, "QAQ_HOST": host}
        with open(self._directory / f"{role}-{port}.log", "wb") as log:
            self._running[address] = subprocess.Popen(
                [*inside, sys.executable, "-m", "services.cli", role, "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": python_path()} | given | self._environment | environment,
            )
        return address

    def until_serving(self, *addresses: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        for address in addresses:
            with grpc.insecure_channel(address) as channel:
                grpc.channel_ready_future(channel).result(deadline - time.monotonic())

    def until_answering(self, address: str) -> None:
        """As `until_serving`, for a gateway."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen(f"http://{address}/health", timeout=5):
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def kill(self, address: str) -> None:
        """As a crash does: nothing is told to anybody."""
        process = self._running.pop(address)
        process.kill()
        process.wait(STOP_S)

    def end(self, address: str) -> None:
        """As `kill`, if it runs."""
        if address in self._running:
            self.kill(address)

    @contextlib.contextmanager
    def stopped(self, address: str) -> Iterator[None]:
        """The process hangs (SIGSTOP) while the context lasts, and then goes on."""
        with paused(self._running[address].pid):
            yield

    def killed(self, pid: int) -> None:
        """Forgets a process that somebody else has killed."""
        address = next(address for address, process in self._running.items() if process.pid == pid)
        self._running.pop(address).wait(STOP_S)

    def log(self, address: str) -> str:
        """What it has written."""
        (path,) = self._directory.glob(f"*-{address.rpartition(':')[2]}.log")
        return path.read_text(errors="replace")

    def stop(self) -> None:
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait(STOP_S)


class ProcessStack(Stack):
    """Processes that are started again when they were killed; so is Redis, with its data."""

    def __init__(self, processes: Processes, redis: Redis, expected: Mapping[Role, int]) -> None:
        super().__init__(redis, expected)
        self._processes = processes

    async def living(self, role: Role) -> list[Victim]:
        if role != "Redis":
            return await super().living(role)
        pid = self._processes.redis.pid  # its clients' addresses are not announced
        return [Victim("Redis", pid)] if pid else []

    async def killed(self, victim: Victim) -> None:
        if victim.role == "Redis":
            await asyncio.to_thread(_gone, victim.pid)  # it has its port until then
            await asyncio.to_thread(self._processes.redis.start)
        else:
            self._processes.killed(victim.pid)
            self._processes.start(_COMMANDS[victim.role])


def crash(redis: EmbeddedRedis, *, data: bool = True) -> None:
    """Kills the server and starts it again, with or without its data. It must have been started with `persist`."""
    assert redis.pid is not None
    assert redis.directory is not None
    process = psutil.Process(redis.pid)
    process.kill()
    process.wait(STOP_S)
    if not data:
        for path in redis.directory.glob("appendonly*"):  # a folder or a file, by its version
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    redis.start()


def _gone(pid: int) -> None:
    """Waits until a killed process has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(STOP_S)


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """A process hangs (SIGSTOP) while the context lasts, and then goes on."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
