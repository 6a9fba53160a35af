"""Starts, replaces and stops the actors of a stack. This process must be connected to the stack's Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from services.cluster import actors, answers, nodes
from services.cluster.actors import GatewayActor, OriginalsActor, RouterActor, WorkerActor, launch
from services.cluster.answers import Report
from services.cluster.autoscaler import Load
from services.cluster.fleet import Fleet, of_worker
from services.cluster.handed import Handed
from services.cluster.nodes import Request
from services.cluster.restarts import records
from services.cluster.roles import Plan
from services.cluster.state import ModelSettings, ServedModel, StackError, StackSettings
from services.common.roles import Role


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
        first, *more = settings.models
        fleets = [Fleet(first), *map(Fleet.another, more)]
        self._fleets = {fleet.key: fleet for fleet in fleets}

    @property
    def settings(self) -> StackSettings:
        """With the models and the numbers of workers that are wanted now."""
        first, *more = (fleet.served for fleet in self._fleets.values())
        return self._settings.model_copy(update={**first.model_dump(), "more": more})

    def go_on(self) -> None:
        """Of a controller that was started again: the workers that there are are those that are wanted."""
        drained = self._drained()
        serving = [name for name in self.names("worker") if name not in drained]
        known, self._fleets = self._fleets, {}
        for key in dict.fromkeys(of_worker(name) or "" for name in sorted(serving)):
            fleet = known.get(key) or self._asked_for(key, serving)
            if fleet is not None:
                workers = len(fleet.mine(serving))
                self._fleets[key] = Fleet(fleet.served, key, fleet.least)
                self._fleets[key].want(workers)
        self._fleets = self._fleets or known

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
        for fleet in self._fleets.values():
            started |= {name: self._worker(name, fleet) for name in map(fleet.worker, range(fleet.served.workers))}
        started["router"] = self._launch("router", RouterActor, plan.router, "router")
        if plan.gateway is not None:
            started["gateway"] = self._launch("gateway", GatewayActor, plan.gateway, "gateway")
        addresses = self._wait(started)
        answers.seen(sum(fleet.served.workers for fleet in self._fleets.values()), self._report)
        for fleet in self._fleets.values():
            answers.served(fleet.name, self._report)
        return addresses

    @property
    def elastic(self) -> list[Fleet]:
        """The models whose number of workers follows their load."""
        return [fleet for fleet in self._fleets.values() if fleet.most > fleet.least]

    def load(self, fleet: Fleet) -> Load:
        """The load of a model's workers. What does not answer is not counted."""
        told = self._asked(fleet.mine(self.names("worker")), "load")
        workers = [each for each in told.values() if each is not None]
        queued = sum(each.get(fleet.name, 0) for each in self._asked(["router"], "queued").values())
        running, waiting, places, short = (sum(part) for part in zip(*workers, strict=True)) if workers else (0,) * 4
        return Load(len(workers), queued + waiting, running, places, short)

    def scale(self, workers: int, model: str = "", most: int | None = None) -> None:
        """Starts or stops workers until there are `workers` that serve.

        Args:
            model: its name, or where it comes from; empty: the first one.
            most: then `workers` is the least number, and how many there are up to this follows the load.
        Raises:
            StackError: the stack has no such model, or a worker did not start.
        """
        fleet = self._fleet(model)
        fleet.least = workers
        fleet.served = fleet.served.model_copy(update={"max_workers": most})
        self.resize(fleet, min(max(fleet.served.workers, workers), most) if most else workers)

    def resize(self, fleet: Fleet, workers: int) -> None:
        """Starts or stops workers of a model until there are so many that serve. Those that were drained are stopped.

        Raises:
            StackError: a worker did not start.
        """
        names = fleet.mine(self.names("worker"))
        drained = [name for name in self._drained() if name in names]
        serving = [name for name in names if name not in drained]
        self._add_workers(fleet, workers - len(serving))
        self.stop([*drained, *serving[workers:]])
        fleet.want(workers)

    def add(self, model: str, workers: int, changes: Mapping[str, Any]) -> str:
        """Starts workers of another model, and waits until the router serves it. Returns the model's name.

        Args:
            changes: fields of `ModelSettings` in which it differs from the first one.
        Raises:
            StackError: there is a model of that name, or it cannot be served; nothing of it is left then.
        """
        first = next(iter(self._fleets.values())).served
        try:
            served = ServedModel.model_validate(
                {**first.model_dump(), "max_workers": None, **changes, "model": model, "workers": workers}
            )
        except ValidationError as error:
            found = error.errors()[0]
            raise StackError(f"{found['loc'][0]}: {found['msg'].removeprefix('Value error, ')}") from error
        fleet = Fleet.another(served)
        if fleet.name in {each.name for each in self._fleets.values()} or fleet.key in self._fleets:
            raise StackError(f'the stack serves "{fleet.name}" already; `qaq scale --model` changes its workers')
        self._add_workers(fleet, workers)
        try:
            self._served(fleet)
        except StackError:
            self.stop(fleet.mine(self.names("worker")))
            raise
        self._fleets[fleet.key] = fleet
        return fleet.name

    def remove(self, model: str, patience_s: float) -> bool:
        """Stops the workers of a model when they have finished what the router had accepted for it. False if that took
        longer than `patience_s`: the streams that were left have ended with an error.

        Raises:
            StackError: the stack has no such model, or no other.
        """
        fleet = self._fleet(model)
        if len(self._fleets) == 1:
            raise StackError(f'"{fleet.name}" is the only model of the stack; `qaq down` stops the stack')
        names = fleet.mine(self.names("worker"))
        for name in names:
            self._report(name, "finishing its streams", None)
        finished = self._retired(names, patience_s)
        del self._fleets[fleet.key]
        self.stop(names)
        for name in names:
            self._report(name, "stopped", 1.0)
        return finished

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
            fleet = self._fleets.get(of_worker(name) or "")
            if fleet is None:  # of a model that is not wanted
                self.stop([name])
                continue
            left = [other for other in fleet.mine(self.names("worker")) if other not in (name, *self._drained())]
            missing = fleet.served.workers - len(left)
            if has_room := not fleet.gpus or self._free_gpus() >= missing * fleet.gpus:
                self._add_workers(fleet, missing)
            self._report(name, "handing over its streams", None)
            try:
                moved += self._hand_over(name)
            finally:
                self.stop([name])
            self._report(name, "stopped", 1.0)
            if not has_room:  # for both at a time
                self._add_workers(fleet, missing)
        return moved

    def names(self, kind: str = "") -> list[str]:
        """Names of the actors of a kind, or of all, those of a fleet in the order of their start."""
        return nodes.names(kind)

    def stop(self, names: list[str]) -> None:
        """Stops actors. Each drains its server before its process ends."""
        actors.stop(names)

    def _fleet(self, model: str) -> Fleet:
        """The workers of a model, by its name or where it comes from; empty: of the first one.

        Raises:
            StackError: there is no such model.
        """
        fleets = self._fleets.values()
        found = [each for each in fleets if not model or model in (each.name, each.served.model)]
        if not found:
            names = ", ".join(each.name for each in fleets)
            raise StackError(f'the stack has no model "{model}"; it has {names}')
        return found[0]

    def _asked_for(self, key: str, names: Iterable[str]) -> Fleet | None:
        """A fleet that this controller does not know, as its workers describe it; None if none of them answers."""
        told = self._asked(Fleet(self._settings, key).mine(names), "model")
        model: ModelSettings | None = next(iter(told.values()), None)
        return None if model is None else Fleet(ServedModel(**model.model_dump()), key)

    def _add_workers(self, fleet: Fleet, count: int) -> None:
        """Starts workers, if the count is positive."""
        names = fleet.free(self.names("worker"), max(0, count))
        started = {name: self._worker(name, fleet) for name in names}
        try:
            self._wait(started)
        except StackError:
            self.stop(list(started))
            raise

    def _hand_over(self, name: str) -> int:
        return answers.handed_over(name)

    def _retired(self, names: Sequence[str], patience_s: float) -> bool:
        return answers.retired(names, patience_s)

    def _served(self, fleet: Fleet) -> None:
        answers.served(fleet.name, self._report)

    def _wait(self, actors: Mapping[str, Any]) -> dict[str, str]:
        return answers.started(actors, self._report)

    def _drained(self) -> list[str]:
        """Names of the workers that take nothing new."""
        return [name for name, draining in self._asked(self.names("worker"), "draining").items() if draining]

    def _recorded(self, names: Sequence[str]) -> dict[str, str]:
        """Where actors serve, by name, as they have written it down."""
        found = records(self._directory) if self._directory else {}
        return {name: found[name].address for name in names if name in found}

    def _asked(self, names: Sequence[str], question: str) -> dict[str, Any]:
        """The answers of actors by name, without those that do not answer, because they start or hang."""
        return answers.ask(names, question)

    def _nodes(self) -> list[nodes.Node]:
        return nodes.nodes()

    def _on(self, ids: Sequence[str]) -> list[str]:
        """Names of the workers on some nodes."""
        return [name for name, actor in nodes.actors().items() if name.startswith("worker") and actor.node in ids]

    def _free_gpus(self) -> float:
        return nodes.free_gpus(self.drained)

    def _worker(self, name: str, fleet: Fleet) -> Any:
        return self._launch(name, WorkerActor, self._plan.of_model(fleet.served), "worker", fleet.gpus)

    def _launch(self, name: str, actor: Any, settings: Any, role: Role, gpus: int = 0) -> Any:
        self._report(name, "starting", None)
        handed = self._handed[role] if self._handed else None
        request = self.request(role, gpus)
        self._preferred[name] = request.near
        return launch(name, actor, settings, request, handed, self._plan.logs)

    def request(self, role: Role, gpus: int = 0) -> Request:
        """What a server asks of its node, with so many GPUs.

        On one machine, GPUs alone. On several, workers go to nodes with GPUs if they are for them, cache services to
        the others, each to the emptiest, and router and gateway to the head, where clients find them.
        """
        spread, workers = self._handed is not None, role == "worker"
        if spread and role in ("router", "gateway"):
            return Request(head=True)
        avoid = set(self.drained)
        if spread and not workers and any(fleet.gpus for fleet in self._fleets.values()):
            others = [node for node in self._nodes() if not node.gpus and node.id not in avoid]
            avoid |= {node.id for node in self._nodes() if node.gpus} if others else set()
        cpus = self._settings.worker_cpus if workers else 0
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
