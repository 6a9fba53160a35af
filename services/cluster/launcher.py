"""Starts, replaces and stops the actors of a stack. This process must be connected to the stack's Ray."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import ray

from services.cluster import actors, nodes
from services.cluster.actors import GatewayActor, OriginalsActor, RouterActor, WorkerActor, launch
from services.cluster.handed import Handed
from services.cluster.nodes import NAMESPACE, Request
from services.cluster.restarts import records
from services.cluster.roles import Plan
from services.cluster.state import StackError, StackSettings
from services.common.roles import Role

START_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 30.0
HAND_OVER_S = 60.0
ASK_S = 10.0
POLL_S = 0.2

Report = Callable[[str, str, float | None], None]


class Launcher:
    """Starts, lists and stops the actors of one stack.

    Args:
        plan: the settings of the servers.
        report: called with (name, stage, progress from 0 to 1 or None) while actors start.
        directory: of the stack, if it is one of this machine.
        handed: by role, what servers on other machines get; None if they are on this one.

    Attributes:
        drained: ids of nodes on which nothing is started any more.
    """

    def __init__(
        self,
        settings: StackSettings,
        plan: Plan,
        report: Report,
        directory: Path | None = None,
        handed: Mapping[Role, Handed] | None = None,
    ) -> None:
        self._settings, self._plan, self._report = settings, plan, report
        self._directory, self._handed = directory, handed
        self.drained: frozenset[str] = frozenset()
        self._preferred: dict[str, str] = {}

    @property
    def settings(self) -> StackSettings:
        """With the number of workers that is wanted now."""
        return self._settings

    def go_on(self) -> None:
        """Of a controller that was started again: the workers that there are are those that are wanted."""
        serving = [name for name in self.names("worker") if name not in self._drained()]
        self._settings = self._settings.model_copy(update={"workers": max(1, len(serving))})

    def start_all(self) -> dict[str, str]:
        """Starts all actors in parallel, because their imports take longest. Returns addresses by name.

        Raises:
            StackError: an actor did not start; the message says which and why.
        """
        settings, plan = self._settings, self._plan
        started = {
            f"originals-{index}": self._launch(f"originals-{index}", OriginalsActor, plan.originals, "originals")
            for index in range(settings.originals)
        }
        started |= {f"worker-{index}": self._worker(index) for index in range(settings.workers)}
        started["router"] = self._launch("router", RouterActor, plan.router, "router")
        if plan.gateway is not None:
            started["gateway"] = self._launch("gateway", GatewayActor, plan.gateway, "gateway")
        addresses = self._wait(started)
        self._wait_until_seen(started["router"])
        return addresses

    def scale(self, workers: int) -> None:
        """Starts or stops workers until there are `workers` that serve. Those that were drained are stopped.

        Raises:
            StackError: a worker did not start.
        """
        drained = self._drained()
        serving = [name for name in self.names("worker") if name not in drained]
        self._add_workers(workers - len(serving))
        self.stop([*drained, *serving[workers:]])
        self._settings = self._settings.model_copy(update={"workers": workers})

    def drain(self, where: str) -> int:
        """Stops a worker, or all workers of a node. Others are started before if fewer than wanted would be left.

        Args:
            where: the worker's address; or a node's id or address, on which nothing is started any more.
        Returns:
            the number of generations that moved.
        Raises:
            StackError: nothing of the stack is there, a worker did not hand over what it ran, or another one did not
                start.
        """
        workers = self.names("worker")
        found = self._recorded(workers) | self._asked(workers, "address")  # one that hangs does not answer
        if (name := next((name for name, at in found.items() if at == where), None)) is not None:
            return self.replace([name])
        on_nodes = [node.id for node in self._nodes() if where in (node.id, node.address)]
        if not on_nodes:
            raise StackError(f"no worker and no node of the stack is at {where}; `qaq status` shows where they are")
        self.drained |= set(on_nodes)
        return self.replace(self._on(on_nodes))

    def restart(self) -> int:
        """Replaces all workers, one after the other. Returns the number of generations that moved.

        Raises:
            StackError: a worker did not start; those that had not had their turn are left as they are.
        """
        return self.replace(self.names("worker"))

    def replace(self, names: Iterable[str]) -> int:
        """Stops workers, one after the other, each when it has handed over what it runs, see `drain`."""
        moved = 0
        for name in names:
            left = [other for other in self.names("worker") if other not in (name, *self._drained())]
            missing = self._settings.workers - len(left)
            if has_room := not self._gpus or self._free_gpus() >= missing * self._gpus:
                self._add_workers(missing)
            self._report(name, "handing over its streams", None)
            try:
                moved += self._hand_over(name)
            finally:
                self.stop([name])
            self._report(name, "stopped", 1.0)
            if not has_room:  # for both at a time
                self._add_workers(missing)
        return moved

    def names(self, kind: str = "") -> list[str]:
        """Names of the actors of a kind, or of all, in the order of their start."""
        return nodes.names(kind)

    def stop(self, names: list[str]) -> None:
        """Stops actors. Each drains its server before its process ends."""
        actors.stop(names)

    def _add_workers(self, count: int) -> None:
        """Starts workers, if the count is positive."""
        names = self.names("worker")
        free = [index for index in range(len(names) + max(0, count)) if f"worker-{index}" not in names]
        started = {f"worker-{index}": self._worker(index) for index in free[: max(0, count)]}
        try:
            self._wait(started)
        except StackError:
            self.stop(list(started))
            raise

    def _hand_over(self, name: str) -> int:
        reference = ray.get_actor(name, namespace=NAMESPACE).hand_over.remote()
        try:
            return int(ray.get(reference, timeout=HAND_OVER_S))
        except ray.exceptions.RayError as error:
            raise StackError(
                f"{name} was stopped before it had handed over what it ran ({type(error).__name__}): its streams go on "
                "elsewhere once their routers notice"
            ) from error

    def _drained(self) -> list[str]:
        """Names of the workers that take nothing new."""
        return [name for name, draining in self._asked(self.names("worker"), "draining").items() if draining]

    def _recorded(self, names: Sequence[str]) -> dict[str, str]:
        """Where actors serve, by name, as they have written it down."""
        found = records(self._directory) if self._directory else {}
        return {name: found[name].address for name in names if name in found}

    def _asked(self, names: Sequence[str], question: str) -> dict[str, Any]:
        """The answers of actors by name, without those that do not answer, because they start or hang."""
        return ask(names, question)

    def _nodes(self) -> list[nodes.Node]:
        return nodes.nodes()

    def _on(self, ids: Sequence[str]) -> list[str]:
        """Names of the workers on some nodes."""
        return [name for name, actor in nodes.actors().items() if name.startswith("worker") and actor.node in ids]

    def _free_gpus(self) -> float:
        return nodes.free_gpus(self.drained)

    def _worker(self, index: int) -> Any:
        return self._launch(f"worker-{index}", WorkerActor, self._plan.worker, "worker")

    def _launch(self, name: str, actor: Any, settings: Any, role: Role) -> Any:
        self._report(name, "starting", None)
        handed = self._handed[role] if self._handed else None
        request = self.request(role)
        self._preferred[name] = request.near
        return launch(name, actor, settings, request, handed, self._plan.logs)

    def request(self, role: Role) -> Request:
        """What a server asks of its node.

        On one machine, GPUs alone. On several, workers go to nodes with GPUs if they are for them, cache services to
        the others, each to the emptiest, and router and gateway to the head, where clients find them.
        """
        spread, workers = self._handed is not None, role == "worker"
        if spread and role in ("router", "gateway"):
            return Request(head=True)
        avoid = set(self.drained)
        if spread and self._gpus and not workers:
            others = [node for node in self._nodes() if not node.gpus and node.id not in avoid]
            avoid |= {node.id for node in self._nodes() if node.gpus} if others else set()
        cpus = self._settings.worker_cpus if workers else 0
        gpus = self._gpus if workers else 0
        near = self._emptiest(role, avoid) if spread and not gpus and not cpus else ""
        return Request(gpus=gpus, cpus=cpus, near=near, spread=spread, avoid=frozenset(avoid))

    def _emptiest(self, role: Role, avoid: Set[str]) -> str:
        """The id of the node with the fewest servers of a role, then the fewest of all; empty if there is none."""
        where = [(name, node) for name, node in self._placed().items() if node not in avoid]
        same = Counter(node for name, node in where if name.startswith(role))
        every = Counter(node for _, node in where)
        fit = [node.id for node in self._nodes() if node.id not in avoid]
        return min(fit, key=lambda node: (same[node], every[node]), default="")

    def _placed(self) -> dict[str, str]:
        """The nodes of all servers by name, or those that they prefer, if they are on none yet."""
        return {name: actor.node or self._preferred.get(name, "") for name, actor in nodes.actors().items()}

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
                raise StackError(f"{late} did not start within {START_TIMEOUT_S:.0f} s; see `qaq logs`")
            self._progress({name: actors[name] for name in pending.values()})
        return addresses

    def _wait_until_seen(self, router: Any) -> None:
        """Waits until the router sees its workers."""
        workers, deadline = self._settings.workers, time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            self._report("router", "waiting for the workers", None)
            if ray.get(router.workers.remote()) >= workers:
                return
            time.sleep(POLL_S)
        raise StackError(f"the router does not see {workers} worker(s); see `qaq logs router`")

    def _progress(self, waiting: Mapping[str, Any]) -> None:
        """Reports the progress of each actor. One that is still importing cannot answer."""
        calls = {name: actor.progress.remote() for name, actor in waiting.items()}
        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=POLL_S) if calls else ([], [])
        for name, reference in calls.items():
            with contextlib.suppress(ray.exceptions.RayError):  # `address` raises the error
                if reference in done:
                    self._report(name, *ray.get(reference))


def ask(names: Sequence[str], question: str, seconds: float = ASK_S) -> dict[str, Any]:
    """The answers of actors by name, without those that do not answer."""
    calls = {}
    for name in names:
        with contextlib.suppress(ValueError):  # it has ended
            calls[name] = getattr(ray.get_actor(name, namespace=NAMESPACE), question).remote()
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds) if calls else ([], [])
    answers = {}
    for name, reference in calls.items():
        with contextlib.suppress(ray.exceptions.RayError):
            if reference in done:
                answers[name] = ray.get(reference)
    return answers


def _result(name: str, reference: Any) -> str:
    try:
        return str(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        raise StackError(f"{name} did not start: {error.cause or error}") from error
    except ray.exceptions.RayError as error:
        raise StackError(
            f"{name} did not start: its process died ({type(error).__name__}); see `qaq logs {name}`"
        ) from error
