"""The actors of a running stack, through a Ray that this process is connected to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from pydantic import SecretStr

from services.cluster.actors import NAMESPACE, GatewayHost, OriginalsHost, RouterHost, WorkerHost, launch
from services.cluster.state import StackError, StackSettings
from services.common.settings import GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.2

Report = Callable[[str, str, float | None], None]


class Launcher:
    """Makes, counts and stops the actors of one stack.

    Args:
        report: told (who, what it does, how much is done) while actors start.
    """

    def __init__(self, settings: StackSettings, redis_url: str, report: Report) -> None:
        self._settings = settings
        self._redis_url = SecretStr(redis_url)
        self._report = report

    def start_all(self) -> dict[str, str]:
        """Starts every role at once, because their imports take longest. Returns addresses by name.

        Raises:
            StackError: one did not start; says which and why.
        """
        settings = self._settings
        started = {f"originals-{index}": self._originals(index) for index in range(settings.originals)}
        started |= {f"worker-{index}": self._worker(index) for index in range(settings.workers)}
        started["router"] = launch(
            "router",
            RouterHost,
            RouterSettings(redis_url=self._redis_url, model=settings.model, port=settings.port),
        )
        if settings.http_port is not None:
            http = GatewaySettings(redis_url=self._redis_url, port=settings.http_port)
            started["gateway"] = launch("gateway", GatewayHost, http)
        return self._wait(started)

    def scale(self, workers: int) -> None:
        """Starts or stops workers until there are that many.

        Raises:
            StackError: one did not start.
        """
        names = self.names("worker")
        free = [index for index in range(len(names) + workers) if f"worker-{index}" not in names]
        self._wait({f"worker-{index}": self._worker(index) for index in free[: max(0, workers - len(names))]})
        self.stop(names[workers:])

    def names(self, kind: str = "") -> list[str]:
        """Names of the actors of a kind, or of all, in the order they were made."""
        listed = ray.util.list_named_actors(all_namespaces=True)
        mine = [e["name"] for e in listed if e["namespace"] == NAMESPACE and e["name"].startswith(kind)]
        return sorted(mine, key=lambda name: (name.partition("-")[0], int(name.partition("-")[2] or 0)))

    def stop(self, names: list[str]) -> None:
        """Stops actors: each may end what runs, then its process goes."""
        handles = []
        for name in names:
            with contextlib.suppress(ValueError):  # it is gone already
                handles.append(ray.get_actor(name, namespace=NAMESPACE))
        if handles:
            asked = [handle.stop.remote() for handle in handles]
            ray.wait(asked, num_returns=len(asked), timeout=STOP_TIMEOUT_S)
        for handle in handles:
            ray.kill(handle, no_restart=True)

    def _originals(self, index: int) -> Any:
        return launch(f"originals-{index}", OriginalsHost, OriginalsSettings(redis_url=self._redis_url, port=0))

    def _worker(self, index: int) -> Any:
        wanted = self._settings
        gpu = wanted.device.startswith("cuda")
        settings = WorkerSettings(
            redis_url=self._redis_url,
            model=wanted.model,
            port=0,
            device=wanted.device,
            dtype=wanted.dtype,
            weights=wanted.weights,
            compiled=wanted.compiled,
            preset=wanted.preset,
            target_bits=wanted.target_bits,
            requantize_wait=wanted.requantize_wait,
        )
        return launch(f"worker-{index}", WorkerHost, settings, gpus=1 if gpu else 0)

    def _wait(self, actors: Mapping[str, Any]) -> dict[str, str]:
        """Addresses by name, when all serve."""
        pending = {actor.address.remote(): name for name, actor in actors.items()}
        addresses: dict[str, str] = {}
        deadline = time.monotonic() + START_TIMEOUT_S
        while pending:
            done, _ = ray.wait(list(pending), timeout=POLL_S)
            for reference in done:
                name = pending.pop(reference)
                addresses[name] = _outcome(name, reference)
                self._report(name, f"serves at {addresses[name]}", 1.0)
            if time.monotonic() > deadline:
                late = ", ".join(pending.values())
                raise StackError(f"{late} did not start within {START_TIMEOUT_S:.0f} s; look at its log")
            self._progress({name: actors[name] for name in pending.values()})
        return addresses

    def _progress(self, waiting: Mapping[str, Any]) -> None:
        """Reports on each; one that is busy with its imports cannot say more than that it starts."""
        asked = {name: actor.progress.remote() for name, actor in waiting.items()}
        done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=POLL_S) if asked else ([], [])
        for name, reference in asked.items():
            what, part = "starting", None
            with contextlib.suppress(ray.exceptions.RayError):  # `address` tells what happened
                if reference in done:
                    what, part = ray.get(reference)
            self._report(name, what, part)


def _outcome(name: str, reference: Any) -> str:
    try:
        return str(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        raise StackError(f"{name} did not start: {error.cause or error}") from error
    except ray.exceptions.RayError as error:
        raise StackError(f"{name} did not start: its process died ({type(error).__name__})") from error
