"""Starts and stops the actors of a stack. This process must be connected to the stack's Ray."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from pydantic import SecretStr

from services.cluster.actors import NAMESPACE, GatewayActor, OriginalsActor, RouterActor, WorkerActor, launch
from services.cluster.state import ModelSettings, StackError, StackSettings
from services.common.settings import GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.2

Report = Callable[[str, str, float | None], None]


class Launcher:
    """Starts, lists and stops the actors of one stack.

    Args:
        secret: of workers and cache services.
        report: called with (name, stage, progress from 0 to 1 or None) while actors start.
    """

    def __init__(self, settings: StackSettings, redis_url: str, secret: str, report: Report) -> None:
        self._settings = settings
        self._redis_url = SecretStr(redis_url)
        # The secret file of the environment has been read: without this the roles would see both.
        self.secret: dict[str, Any] = {"secret": SecretStr(secret), "secret_file": None}
        self._report = report

    def start_all(self) -> dict[str, str]:
        """Starts all actors in parallel, because their imports take longest. Returns addresses by name.

        Raises:
            StackError: an actor did not start; the message says which and why.
        """
        settings = self._settings
        started = {f"originals-{index}": self._originals(index) for index in range(settings.originals)}
        started |= {f"worker-{index}": self._worker(index) for index in range(settings.workers)}
        started["router"] = launch(
            "router",
            RouterActor,
            RouterSettings(redis_url=self._redis_url, model=settings.model, port=settings.port),
        )
        if settings.http_port is not None:
            http = GatewaySettings(redis_url=self._redis_url, port=settings.http_port)
            started["gateway"] = launch("gateway", GatewayActor, http)
        return self._wait(started)

    def scale(self, workers: int) -> None:
        """Starts or stops workers until there are `workers`.

        Raises:
            StackError: a worker did not start.
        """
        names = self.names("worker")
        free = [index for index in range(len(names) + workers) if f"worker-{index}" not in names]
        self._wait({f"worker-{index}": self._worker(index) for index in free[: max(0, workers - len(names))]})
        self.stop(names[workers:])

    def names(self, kind: str = "") -> list[str]:
        """Names of the actors of a kind, or of all, in the order of their start."""
        listed = ray.util.list_named_actors(all_namespaces=True)
        found = [e["name"] for e in listed if e["namespace"] == NAMESPACE and e["name"].startswith(kind)]
        return sorted(found, key=lambda name: (name.partition("-")[0], int(name.partition("-")[2] or 0)))

    def stop(self, names: list[str]) -> None:
        """Stops actors. Each drains its server before its process ends."""
        handles = []
        for name in names:
            with contextlib.suppress(ValueError):  # it has ended already
                handles.append(ray.get_actor(name, namespace=NAMESPACE))
        if handles:
            stopped = [handle.stop.remote() for handle in handles]
            ray.wait(stopped, num_returns=len(stopped), timeout=STOP_TIMEOUT_S)
        for handle in handles:
            ray.kill(handle, no_restart=True)

    def _originals(self, index: int) -> Any:
        settings = OriginalsSettings(redis_url=self._redis_url, port=0, **self.secret)
        return launch(f"originals-{index}", OriginalsActor, settings)

    def _worker(self, index: int) -> Any:
        gpu = self._settings.device.startswith("cuda")
        model = self._settings.model_dump(include=set(ModelSettings.model_fields))
        settings = WorkerSettings(redis_url=self._redis_url, port=0, **self.secret, **model)
        return launch(f"worker-{index}", WorkerActor, settings, gpus=1 if gpu else 0)

    def _wait(self, actors: Mapping[str, Any]) -> dict[str, str]:
        """Waits until all actors are up. Returns their addresses by name."""
        pending = {actor.address.remote(): name for name, actor in actors.items()}
        addresses: dict[str, str] = {}
        deadline = time.monotonic() + START_TIMEOUT_S
        while pending:
            done, _ = ray.wait(list(pending), timeout=POLL_S)
            for reference in done:
                name = pending.pop(reference)
                addresses[name] = _result(name, reference)
                self._report(name, f"serves at {addresses[name]}", 1.0)
            if time.monotonic() > deadline:
                late = ", ".join(pending.values())
                raise StackError(f"{late} did not start within {START_TIMEOUT_S:.0f} s; see its log")
            self._progress({name: actors[name] for name in pending.values()})
        return addresses

    def _progress(self, waiting: Mapping[str, Any]) -> None:
        """Reports the progress of each actor. One that is still importing cannot answer."""
        calls = {name: actor.progress.remote() for name, actor in waiting.items()}
        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=POLL_S) if calls else ([], [])
        for name, reference in calls.items():
            stage, part = "starting", None
            with contextlib.suppress(ray.exceptions.RayError):  # `address` raises the error
                if reference in done:
                    stage, part = ray.get(reference)
            self._report(name, stage, part)


def _result(name: str, reference: Any) -> str:
    try:
        return str(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        raise StackError(f"{name} did not start: {error.cause or error}") from error
    except ray.exceptions.RayError as error:
        raise StackError(f"{name} did not start: its process died ({type(error).__name__})") from error
