"""The stack of one machine: Redis, Ray, cache services, workers, the router and the gateway."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
from pydantic import ValidationError
from qaq.v1 import generate_pb2, generate_pb2_grpc

from services.cluster.state import StackError, StackSettings, StackState
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import PageSettings

OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum: no data of ours goes through it
READY_TIMEOUT_S = 30.0
# A Unix socket's path is limited to about 100 bytes, of which Ray uses 65 below its directory.
_MAX_TMP_BYTES = 30

Report = Callable[[str, str, float | None], None]


class LocalStack:
    """Starts and stops a stack that this process owns.

    Args:
        report: called with (name, stage, progress from 0 to 1 or None) during the start.
    """

    def __init__(self, settings: StackSettings, report: Report) -> None:
        self._settings = settings
        self._report = report
        self._stack = contextlib.ExitStack()

    def start(self) -> StackState:
        """Starts everything and returns when the stack can answer requests.

        Raises:
            StackError, RedisStartError: the message says what failed and what to change. Nothing is left running.
        """
        with contextlib.ExitStack() as stack:
            _check_port(self._settings.port, "--port")
            _check_port(self._settings.http_port or 0, "--http-port")
            secret = chosen_secret()
            redis = self._redis(stack)
            directory, address = self._ray(stack)
            from services.cluster.launcher import Launcher  # imported here because Ray reads the environment at import

            launcher = Launcher(self._settings, redis.url, secret, self._report)
            stack.callback(lambda: launcher.stop(launcher.names()))
            addresses = launcher.start_all()
            router = addresses["router"]
            self._wait_until_ready(router)
            self._report("router", f"serves at {router}", 1.0)
            self._stack = stack.pop_all()
        return StackState(
            settings=self._settings,
            pid=os.getpid(),
            born=psutil.Process().create_time(),
            router=router,
            gateway=addresses.get("gateway"),
            ray_address=address,
            ray_directory=directory,
            redis=redis.state(),
            secret=secret,
        )

    def stop(self) -> None:
        """Stops everything that `start` started."""
        self._stack.close()

    def _redis(self, stack: contextlib.ExitStack) -> EmbeddedRedis:
        self._report("redis", "starting", None)
        redis = EmbeddedRedis(os.environ.get("QAQ_REDIS_URL"))
        stack.callback(redis.stop)
        redis.start()
        self._report("redis", redis.description, 1.0)
        return redis

    def _ray(self, stack: contextlib.ExitStack) -> tuple[Path, str]:
        """Starts Ray's head with a private directory. Returns the directory and the head's address."""
        self._report("ray", "starting", None)
        base = tempfile.gettempdir()
        directory = Path(tempfile.mkdtemp(prefix="qaq-ray-", dir=base if len(base) <= _MAX_TMP_BYTES else "/tmp"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        token = directory / "token"
        with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        ray_environment(directory)
        import ray

        stack.callback(ray.shutdown)
        try:
            ray.init(
                address="local",
                namespace="qaq",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="error",
                _temp_dir=str(directory),
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:
            raise StackError(
                f"Ray did not start ({error}); check space and permissions in {directory.parent}"
            ) from error
        address = str(ray.get_runtime_context().gcs_address)
        self._report("ray", f"head at {address}", 1.0)
        return directory, address

    def _wait_until_ready(self, router: str) -> None:
        """Waits until the router sees its workers."""
        workers = self._settings.workers
        deadline = time.monotonic() + READY_TIMEOUT_S
        with grpc.insecure_channel(router) as channel:
            stub = generate_pb2_grpc.InferenceStub(channel)
            while time.monotonic() < deadline:
                self._report("router", "waiting for the workers", None)
                with contextlib.suppress(grpc.RpcError):  # UNAVAILABLE until it has seen one
                    if stub.GetModel(generate_pb2.GetModelRequest(), timeout=5).workers >= workers:
                        return
                time.sleep(0.1)
        raise StackError(f"the router at {router} does not see {workers} worker(s); see its log")


def chosen_secret() -> str:
    """The secret that the environment has, or a new one."""
    try:
        return PageSettings().secret.get_secret_value() or secrets.token_hex(32)
    except ValidationError as error:
        raise StackError(f"QAQ_SECRET or QAQ_SECRET_FILE: {error.errors()[0]['msg']}") from error


def ray_environment(directory: Path) -> None:
    """Sets the environment of Ray and its actors. Call it before Ray is imported.

    Ray listens on every interface, so token authentication is on, with a token of this stack.
    """
    os.environ["PYTHONPATH"] = python_path()
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(directory / "token")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray runs actors at niceness 15: beside anything else that computes, they would get next to nothing.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Without this, Ray gives an actor that reserves no CPU a single compute thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(psutil.cpu_count(logical=False) or os.cpu_count() or 1))


def python_path() -> str:
    """A PYTHONPATH with which a child process finds this program's packages in any working directory."""
    import qaq

    import services

    packages = [str(Path(module.__path__[0]).parent) for module in (services, qaq)]
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys(path for path in [*packages, *known] if path))


def _check_port(port: int, option: str) -> None:
    """Fails before anything is started if the port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StackError(f"port {port} is taken; choose another with {option} (0 takes any free port)") from error
