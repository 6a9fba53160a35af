"""Which workers of a stack are started and stopped, in which order, when it is scaled and drained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from services.cluster import roles
from services.cluster.access import Access
from services.cluster.autoscaler import Load
from services.cluster.deploy import ROLES
from services.cluster.fleet import Fleet
from services.cluster.handed import Handed
from services.cluster.launcher import Launcher
from services.cluster.nodes import Node
from services.cluster.restarts import Life
from services.cluster.state import ModelSettings, ServedModel, StackError, StackSettings

A, B = "a" * 56, "b" * 56  # ids of nodes


class Simulated(Launcher):
    """Its actors are a table: by name whether each drains.

    Attributes:
        least: fewest workers that have served at a time since the start.
        hung: names of those that answer nothing. stopped: names of those that were stopped, in that order.
        devices: by name, of those that were started.
        finishes: whether workers that retire finish in time. unserved: why the router cannot serve a new model.
    """

    def __init__(
        self, workers: int, room: int = 100, directory: Path | None = None, more: Sequence[ServedModel] = ()
    ) -> None:
        access = Access(redis={"url": "redis://127.0.0.1", "description": "", "pid": None})
        settings = StackSettings(model="m", workers=workers, more=list(more))
        super().__init__(settings, roles.plan(settings, access), lambda *_: None, directory)
        self.hung, self.stopped = set[str](), list[str]()
        fleets = self._fleets.values()
        names = [fleet.worker(index) for fleet in fleets for index in range(fleet.served.workers)]
        self.table = dict.fromkeys(names, False)
        self.least, self._room = len(names), room
        self.devices: dict[str, str] = {}
        self.finishes, self.unserved = True, ""

    @property
    def serving(self) -> list[str]:
        return [name for name, drains in self.table.items() if not drains]

    def names(self, kind: str = "") -> list[str]:
        return list(self.table)

    def _hand_over(self, name: str) -> int:
        if name in self.hung:
            raise StackError(f"{name} was stopped")
        self.table[name] = True
        self.least = min(self.least, len(self.serving))
        return 3

    def _nodes(self) -> list[Node]:
        return [Node("a", "10.0.0.1"), Node("b", "10.0.0.2")]

    def _on(self, ids: Any) -> list[str]:
        """Even workers are on node a, odd ones on b."""
        return [name for name in self.table if "ab"[int(name[-1]) % 2] in ids]

    def _placed(self) -> dict[str, str]:
        return {name: "ab"[int(name[-1]) % 2] for name in self.table}

    def stop(self, names: list[str]) -> None:
        self.stopped += names
        for name in names:
            del self.table[name]
        self.least = min(self.least, len(self.serving))

    def _worker(self, name: str, fleet: Fleet) -> Any:
        self.devices[name] = self._plan.of_model(fleet.served).device
        return name

    def _served(self, fleet: Fleet) -> None:
        if self.unserved:
            raise StackError(self.unserved)

    def _retired(self, names: Any, patience_s: float) -> bool:
        assert set(names) <= set(self.table)
        return self.finishes

    def _wait(self, actors: Any) -> dict[str, str]:
        assert not set(actors) & set(self.table)
        self.table |= dict.fromkeys(actors, False)
        if len(self.table) > self._room:
            raise StackError("no room")
        return {}

    def _asked(self, names: Any, question: str) -> dict[str, Any]:
        answering = [name for name in names if name not in self.hung]
        if question == "queued":
            return {"router": {"m": 4, "other": 9}}
        if question == "load":
            return {name: None if self.table[name] else (5, 1, 8, name == "worker-1") for name in answering}
        if question == "model":
            return {name: ModelSettings(model="/models/" + name.split("-")[1], preset="fp16") for name in answering}
        return {name: self.table[name] if question == "draining" else f"at {name}" for name in answering}


def test_a_drained_worker_is_replaced_before_it_goes() -> None:
    stack = Simulated(1)
    assert stack.drain("at worker-0") == 3
    assert (stack.serving, stack.least) == (["worker-1"], 1)


def test_drain_and_scale_in_any_order_leave_what_was_asked_for() -> None:
    for first in (0, 1):
        stack = Simulated(2)
        stack.drain(f"at worker-{first}")
        assert len(stack.serving) == 2
        stack.scale(1)
        assert (len(stack.table), len(stack.serving), stack.least) == (1, 1, 1)


def test_a_worker_that_was_drained_by_others_does_not_count() -> None:
    stack = Simulated(2)
    stack._hand_over("worker-0")
    stack.scale(1)
    assert (stack.table, stack.least) == ({"worker-1": False}, 1)
    stack._hand_over("worker-1")
    stack.scale(2)
    assert stack.table == {"worker-0": False, "worker-2": False}


def test_bounds_last_until_a_number_is_asked_for() -> None:
    stack = Simulated(1)
    assert stack.elastic == []
    stack.scale(2, most=4)
    (fleet,) = stack.elastic
    assert (fleet.least, fleet.most, len(stack.serving)) == (2, 4, 2)
    stack.resize(fleet, 3)
    stack.scale(1, most=4)  # as many as the load has asked for
    assert (fleet.least, len(stack.serving)) == (1, 3)
    stack.scale(1, most=2)
    assert len(stack.serving) == 2
    stack.scale(2)
    assert (stack.elastic, fleet.least, fleet.most) == ([], 2, 2)


def test_the_load_is_that_of_the_workers_that_take_something() -> None:
    stack = Simulated(3)
    (fleet,) = stack._fleets.values()
    assert stack.load(fleet) == Load(workers=3, waiting=3 + 4, running=15, places=24, short=1)
    stack._hand_over("worker-1")
    stack.hung = {"worker-2"}
    assert stack.load(fleet) == Load(workers=1, waiting=1 + 4, running=5, places=8)


def test_bounds_outlive_the_controller() -> None:
    stack = Simulated(1)
    stack.scale(1, most=3)
    stack.resize(stack.elastic[0], 2)
    stack.go_on()
    (fleet,) = stack.elastic
    assert (fleet.least, fleet.most, fleet.served.workers) == (1, 3, 2)


def test_one_that_is_more_than_was_asked_for_is_not_replaced() -> None:
    stack = Simulated(1)
    stack.table["worker-7"] = False
    stack.drain("at worker-0")
    assert stack.serving == ["worker-7"]


def test_without_room_for_another_nothing_is_drained() -> None:
    stack = Simulated(1, room=1)
    with pytest.raises(StackError, match="no room"):
        stack.drain("at worker-0")
    assert stack.serving == ["worker-0"]


def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    """It answers nobody, but has written down where it is."""
    stack = Simulated(2, directory=tmp_path)
    for name in (*stack.table, "worker-7"):  # the last one has ended
        Life(tmp_path, name).serves(f"at {name}")
    stack.hung.add("worker-1")
    with pytest.raises(StackError, match="worker-1 was stopped"):
        stack.drain("at worker-1")
    assert (stack.serving, stack.least) == (["worker-0", "worker-2"], 2)
    with pytest.raises(StackError, match="no worker and no node of the stack is at"):
        stack.drain("at worker-7")


def test_an_address_of_nobody() -> None:
    with pytest.raises(StackError, match=r"of the stack is at 127\.0\.0\.1:1; `qaq status` shows"):
        Simulated(1).drain("127.0.0.1:1")


def test_a_node_is_drained_and_stays_empty() -> None:
    stack = Simulated(3)
    assert stack.drain("10.0.0.1") == 6
    assert (stack.stopped, len(stack.serving), stack.least) == (["worker-0", "worker-2"], 3, 3)
    assert stack.request("worker").options()["label_selector"] == {"ray.io/node-id": "!in(a)"}


def test_all_workers_are_replaced_one_after_the_other() -> None:
    stack = Simulated(3)
    assert stack.restart() == 9
    assert (stack.stopped, len(stack.serving), stack.least) == (["worker-0", "worker-1", "worker-2"], 3, 3)


def test_a_worker_that_does_not_start_is_taken_away_again() -> None:
    stack = Simulated(1, room=2)
    with pytest.raises(StackError, match="no room"):
        stack.scale(3)
    assert stack.table == {"worker-0": False}


def test_each_model_has_its_workers() -> None:
    stack = Simulated(1, more=[ServedModel(model="/models/b", workers=2)])
    assert stack.serving == ["worker-0", "worker-b-0", "worker-b-1"]
    stack.scale(2)
    stack.scale(1, "b")
    assert stack.serving == ["worker-0", "worker-b-0", "worker-1"]
    stack.drain("at worker-b-0")
    assert stack.serving == ["worker-0", "worker-1", "worker-b-1"]
    assert [(each.model, each.workers) for each in stack.settings.models] == [("m", 2), ("/models/b", 1)]
    with pytest.raises(StackError, match='the stack has no model "c"; it has m, b'):
        stack.scale(1, "c")


def test_a_model_is_added_with_what_differs() -> None:
    stack = Simulated(1)
    assert stack.add("/models/b", 2, {"preset": "fp16", "device": "cuda"}) == "b"
    assert stack.serving == ["worker-0", "worker-b-0", "worker-b-1"]
    assert stack.devices == {"worker-b-0": "cuda", "worker-b-1": "cuda"}
    assert [each.preset for each in stack.settings.models] == ["balanced", "fp16"]
    with pytest.raises(StackError, match='serves "b" already'):
        stack.add("/elsewhere/b", 1, {})
    with pytest.raises(StackError, match="preset: "):
        stack.add("/models/c", 1, {"preset": "zip"})
    assert len(stack.table) == 3


def test_a_model_that_cannot_be_served_is_taken_away_again() -> None:
    stack = Simulated(1)
    stack.unserved = "there is no tokenizer"
    with pytest.raises(StackError, match="there is no tokenizer"):
        stack.add("/models/b", 2, {})
    assert (stack.serving, stack.stopped) == (["worker-0"], ["worker-b-0", "worker-b-1"])
    assert len(stack.settings.models) == 1


@pytest.mark.parametrize("finishes", [True, False])
def test_a_model_is_removed(finishes: bool) -> None:
    stack = Simulated(1, more=[ServedModel(model="/models/b", workers=2)])
    stack.finishes = finishes
    assert stack.remove("b", 1.0) is finishes
    assert (stack.serving, stack.stopped) == (["worker-0"], ["worker-b-0", "worker-b-1"])
    with pytest.raises(StackError, match='"m" is the only model of the stack'):
        stack.remove("", 1.0)


def test_the_first_model_may_be_removed() -> None:
    stack = Simulated(1, more=[ServedModel(model="/models/b")])
    stack.remove("m", 1.0)
    stack.scale(2)
    assert stack.serving == ["worker-b-0", "worker-b-1"]


def test_a_controller_that_was_started_again_goes_on_with_the_models_that_there_are() -> None:
    stack = Simulated(1, more=[ServedModel(model="/models/b", preset="paper")])
    del stack.table["worker-0"]
    stack.table |= {"worker-b-1": False, "worker-c-0": False}
    stack.go_on()
    told = [(each.model, each.workers, each.preset) for each in stack.settings.models]
    assert told == [("/models/b", 2, "paper"), ("/models/c", 1, "fp16")]
    stack.scale(2, "c")
    assert stack.serving == ["worker-b-0", "worker-b-1", "worker-c-0", "worker-c-1"]


def test_what_servers_ask_of_their_nodes() -> None:
    """Workers go to GPUs, and the others elsewhere if there is an elsewhere; one machine asks for nothing."""
    access = Access(redis={"url": "redis://127.0.0.1", "description": "", "pid": None})
    settings = StackSettings(model="m", device="cuda", worker_cpus=2)
    handed = dict.fromkeys(ROLES, Handed())

    class Mixed(Launcher):
        def _nodes(self) -> list[Node]:
            return [Node(A, "10.0.0.1", gpus=1), Node(B, "10.0.0.2")]

        def _placed(self) -> dict[str, str]:
            return {"router": A, "originals-0": B, "worker-0": A}

    class Gpus(Mixed):
        def _nodes(self) -> list[Node]:
            return super()._nodes()[:1]

    plan = roles.plan(settings, access)
    mixed, gpus, cpus = (
        Mixed(settings, plan, print, None, handed),
        Gpus(settings, plan, print, None, handed),
        Mixed(StackSettings(model="m"), plan, print, None, handed),
    )
    worker, originals = mixed.request("worker", gpus=1), mixed.request("originals")
    assert worker.options() == {"num_cpus": 2, "num_gpus": 1, "scheduling_strategy": "SPREAD"}
    assert originals.options()["num_cpus"] == 0.001
    assert (originals.near, originals.avoid, gpus.request("originals").avoid) == (B, {A}, set())
    assert originals.options()["label_selector"] == {"ray.io/node-id": f"!in({A})"}
    preferred = originals.options()["scheduling_strategy"]
    assert (preferred.node_id, preferred.soft) == (B, True)
    assert (cpus.request("worker").near, cpus.request("originals").near) == (B, A)
    assert mixed.request("router").options()["resources"] == {"node:__internal_head__": 0.001}
    local = Mixed(settings, plan, print)
    assert local.request("originals").options() == {"num_cpus": 0, "num_gpus": 0}
