"""The stack of one machine: Redis, Ray, cache services, workers, the router and the gateway."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import psutil
from pydantic import ValidationError

from services.cluster import logs, roles
from services.cluster.access import Access
from services.cluster.foundation import Foundation
from services.cluster.keys import StackKeys
from services.cluster.restarts import MONITOR
from services.cluster.slow_start import patient
from services.cluster.state import Owner, StackError, StackSettings, StackState
from services.common.certificates import issue
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import PageSettings

OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum: no data of ours goes through it
RAY_TIMEOUT_S = 180.0

Report = Callable[[str, str, float | None], None]


class LocalStack:
    """Starts and stops a stack.

    Args:
        owner: its guard, which has made its directory.
        report: called with (name, stage, progress from 0 to 1 or None) during the start.
        keys: directory for keys that outlive the stack; None makes keys that do not.
    """

    def __init__(self, settings: StackSettings, owner: Owner, report: Report, keys: Path | None = None) -> None:
        self._settings = settings
        self._owner = owner
        self._report = report
        self._kept_keys = keys
        self._stack = contextlib.ExitStack()
        self._foundation: Foundation | None = None

    def start(self) -> StackState:
        """Starts everything and returns when the stack can answer requests.

        Raises:
            StackError, RedisStartError: the message says what failed and what to change. Nothing is left running.
        """
        with contextlib.ExitStack() as stack:
            roles.check_ports(self._settings)
            secret = chosen_secret()
            redis = self._redis(stack)
            address = self._ray(stack)
            from services.cluster import actors, controller, nodes  # here because Ray reads the environment at import

            access = Access(redis=redis.state(), certificates=self._certificates(), secret=secret)
            keys = self._keys()
            kept = logs.folder() if self._kept_keys else None
            plan = roles.plan(self._settings, access, _who_may_call(self._settings, keys), kept)
            stack.callback(lambda: actors.stop(nodes.names()))
            changes = controller.launch(self._settings, plan, self._owner.directory)
            addresses = controller.call(changes, "start", report=self._report)
            router = addresses["router"]
            self._report("router", f"serves at {router}", 1.0)
            self._foundation = Foundation(redis, self._owner.directory)
            self._stack = stack.pop_all()
        return StackState(
            **self._owner.model_dump(),
            settings=self._settings,
            router=router,
            gateway=addresses.get("gateway"),
            ray_address=address,
            redis=access.redis,
            certificates=access.certificates,
            keys=keys.directory if keys else None,
            secret=secret,
        )

    def check(self) -> None:
        """Looks after Redis and Ray, see `Foundation.check`.

        Raises:
            FoundationError: the stack cannot go on, and its servers cannot be asked to stop.
        """
        if self._foundation is not None:
            self._foundation.check()

    def stop(self) -> None:
        """Stops everything that `start` started."""
        self._stack.close()

    def _redis(self, stack: contextlib.ExitStack) -> EmbeddedRedis:
        self._report("redis", "starting", None)
        redis = EmbeddedRedis(os.environ.get("QAQ_REDIS_URL") or None, directory=self._owner.directory / "redis")
        stack.callback(redis.stop)
        redis.start()
        self._report("redis", redis.description, 1.0)
        return redis

    def _certificates(self) -> Path | None:
        """Makes the stack's CA and certificates."""
        if not self._settings.tls:
            return None
        directory = self._owner.directory / "tls"
        issue(directory)
        return directory

    def _ray(self, stack: contextlib.ExitStack) -> str:
        """Starts Ray's head. Returns its address. Ray opens its directory to everybody, but not the one above it."""
        self._report("ray", "starting", None)
        directory = self._owner.directory
        try:
            with open(os.open(directory / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        except OSError as error:
            raise StackError(f"{directory} cannot be written ({error.strerror}); make room, or set TMPDIR") from error
        ray_environment(directory)
        import ray

        stack.callback(ray.shutdown)
        try:
            with patient(RAY_TIMEOUT_S):
                ray.init(
                    address="local",
                    namespace="qaq",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level="error",
                    _temp_dir=str(directory / "r"),
                    _node_ip_address="127.0.0.1",
                )
        except Exception as error:
            raise StackError(
                f"Ray did not start ({error}); try again when this machine is less busy, or check the space in "
                f"{directory.parent}"
            ) from error
        address = str(ray.get_runtime_context().gcs_address)
        self._report("ray", f"head at {address}", 1.0)
        return address

    def _keys(self) -> StackKeys | None:
        """The stack's keys; None if the router asks for none, or has a tenants file of its own.

        Raises:
            ConfigError: the tenants file cannot be used.
            StackError: QAQ_TENANTS_FILE is set, and no key to call the router with.
        """
        if not self._settings.keys:
            return None
        if os.environ.get("QAQ_TENANTS_FILE"):
            if not os.environ.get("QAQ_API_KEY"):
                raise StackError("QAQ_TENANTS_FILE is set; set QAQ_API_KEY to a key of it too, or unset it")
            return None
        keys = StackKeys(self._kept_keys or self._owner.directory / "keys")
        keys.make()
        return keys


def _who_may_call(settings: StackSettings, keys: StackKeys | None) -> dict[str, Path | None]:
    """The router's settings of who may call it; empty leaves them to the environment."""
    if keys is not None:
        return {"tenants_file": keys.tenants}
    return {} if settings.keys else {"tenants_file": None}


def chosen_secret() -> str:
    """The secret that the environment has, or a new one."""
    try:
        return PageSettings().secret.get_secret_value() or secrets.token_hex(32)
    except ValidationError as error:
        raise StackError(f"QAQ_SECRET or QAQ_SECRET_FILE: {error.errors()[0]['msg']}") from error


def ray_environment(directory: Path) -> None:
    """Sets the environment of Ray and its actors. Call it before Ray is imported.

    Args:
        directory: of the stack; it has the token.
    """
    os.environ["PYTHONPATH"] = python_path()
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(directory / "token")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray replaces a loopback address by one that others can reach, and listens there, unless it has no clusters.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # When memory is short, Ray would end the actors that were started last: the router and the gateway. The kernel ends
    # the largest first, and before it a worker, see `actors.WorkerActor`.
    os.environ.setdefault(MONITOR, "0")
    os.environ.setdefault("RAY_worker_oom_score_adjustment", "0")
    # Ray's autoscaler, which has nothing to do here, would show its metrics to every user of the machine. No setting
    # says not to; a port that cannot be is logged, and nothing is served.
    os.environ["AUTOSCALER_METRIC_PORT"] = "-1"
    # An actor that imports slowly on a busy machine is not started over and over again.
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "300")
    os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")
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
