"""Starts and stops the actors of a stack. This process must be connected to the stack's Ray."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from services.cluster import roles
from services.cluster.access import Access
from services.cluster.actors import NAMESPACE, GatewayActor, OriginalsActor, RouterActor, WorkerActor, launch
from services.cluster.restarts import records
from services.cluster.state import StackError, StackSettings

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
ASK_S = 10.0
POLL_S = 0.2

Report = Callable[[str, str, float | None], None]


class Launcher:
    """Starts, lists and stops the actors of one stack.

    Args:
        access: who each server is.
        report: called with (name, stage, progress from 0 to 1 or None) while actors start.
        router: settings of the router beside the stack's.
        directory: of the stack, if it runs.
    """

    def __init__(
        self,
        settings: StackSettings,
        access: Access,
        report: Report,
        router: Mapping[str, Any] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._settings = settings
        self._access = access
        self._report = report
        self._router = dict(router or {})
        self._directory = directory

    def start_all(self) -> dict[str, str]:
        """Starts all actors in parallel, because their imports take longest. Returns addresses by name.

        Raises:
            StackError: an actor did not start; the message says which and why.
        """
        settings = self._settings
        started = {f"originals-{index}": self._originals(index) for index in range(settings.originals)}
        started |= {f"worker-{index}": self._worker(index) for index in range(settings.workers)}
        started["router"] = launch(
            "router", RouterActor, roles.router(settings, self._access.settings("router") | self._router)
        )
        if (gateway := roles.gateway(settings, self._access.settings("gateway"))) is not None:
            started["gateway"] = launch("gateway", GatewayActor, gateway)
        return self._wait(started)

    def scale(self, workers: int) -> None:
        """Starts or stops workers until there are `workers` that serve. Those that were drained are stopped.

        Raises:
            StackError: a worker did not start.
        """
        drained = self._drained()
        serving = [name for name in self.names("worker") if name not in drained]
        self._add_workers(workers - len(serving))
        self.stop([*drained, *serving[workers:]])

    def drain(self, address: str, hand_over: Callable[[], int]) -> int:
        """Stops the worker at an address. Another one is started before if fewer than asked for would be left.

        Args:
            hand_over: makes it drain; returns the number of generations that moved.
        Returns:
            what `hand_over` returned.
        Raises:
            StackError: no worker of the stack has this address, or the other one did not start.
        """
        drained = self._drained()
        workers = self.names("worker")
        found = self._recorded(workers) | self._asked(workers, "address")  # one that hangs does not answer
        name = next((name for name, at in found.items() if at == address), None)
        if name is None:
            raise StackError(f"no worker of the stack is at {address}; `qaq status` shows where they are")
        left = [other for other in self.names("worker") if other not in (name, *drained)]
        missing = self._settings.workers - len(left)
        if has_room := not self._gpus or ray.available_resources().get("GPU", 0) >= missing * self._gpus:
            self._add_workers(missing)
        try:
            moved = hand_over()
        finally:
            self.stop([name])
        if not has_room:  # for both at a time
            self._add_workers(missing)
        return moved

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

    def _add_workers(self, count: int) -> None:
        """Starts workers, if the count is positive."""
        names = self.names("worker")
        free = [index for index in range(len(names) + max(0, count)) if f"worker-{index}" not in names]
        self._wait({f"worker-{index}": self._worker(index) for index in free[: max(0, count)]})

    def _drained(self) -> list[str]:
        """Names of the workers that take nothing new."""
        return [name for name, draining in self._asked(self.names("worker"), "draining").items() if draining]

    def _recorded(self, names: Sequence[str]) -> dict[str, str]:
        """Where actors serve, by name, as they have written it down."""
        found = records(self._directory) if self._directory else {}
        return {name: found[name].address for name in names if name in found}

    def _asked(self, names: Sequence[str], question: str) -> dict[str, Any]:
        """The answers of actors by name, without those that do not answer, because they start or hang."""
        calls = {}
        for name in names:
            with contextlib.suppress(ValueError):  # it has ended
                calls[name] = getattr(ray.get_actor(name, namespace=NAMESPACE), question).remote()
        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=ASK_S) if calls else ([], [])
        answers = {}
        for name, reference in calls.items():
            with contextlib.suppress(ray.exceptions.RayError):
                if reference in done:
                    answers[name] = ray.get(reference)
        return answers

    def _originals(self, index: int) -> Any:
        return launch(f"originals-{index}", OriginalsActor, roles.originals(self._access.settings("originals")))

    def _worker(self, index: int) -> Any:
        settings = roles.worker(self._settings, self._access.settings("worker"))
        return launch(f"worker-{index}", WorkerActor, settings, gpus=self._gpus)

    @property
    def _gpus(self) -> int:
        """That each worker reserves."""
        return 1 if self._settings.device.startswith("cuda") else 0

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
