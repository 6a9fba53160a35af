"""Ray's nodes: which there are, what runs on them, and what a server asks of its node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "qaq"
_HEAD = "node:__internal_head__"  # a resource that Ray gives its head
_LEAST = 0.001  # of a CPU: what reserves nothing goes anywhere, whatever it asks for
_NODE_ID = "ray.io/node-id"  # a label that Ray gives every node


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a server asks of its node.

    CPUs are hardly reserved if `cpus` is 0: an idle server uses none, and a machine may have fewer CPUs than servers.

    Attributes:
        gpus, cpus: that it reserves. With CPUs, Ray gives it as many compute threads.
        near: id of the node that it prefers. Ray does not see how many servers are where.
        spread: it goes where Ray has most left. One machine needs no such choice.
        head: it goes to the head, whose address clients know.
        avoid: ids of nodes on which it does not go, now or when it is started again.
    """

    gpus: float = 0
    cpus: float = 0
    near: str = ""
    spread: bool = False
    head: bool = False
    avoid: frozenset[str] = field(default_factory=frozenset)

    def options(self) -> dict[str, Any]:
        """As options of a Ray actor."""
        asked: dict[str, Any] = {"num_cpus": self.cpus or (_LEAST if self.spread else 0), "num_gpus": self.gpus}
        if self.head:
            asked["resources"] = {_HEAD: 0.001}
        elif self.near:
            asked["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self.near, soft=True)
        elif self.spread:
            asked["scheduling_strategy"] = "SPREAD"
        if self.avoid:
            asked["label_selector"] = {_NODE_ID: f"!in({','.join(sorted(self.avoid))})"}
        return asked


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        gpus: that it has.
        drained: nothing new is started on it.
    """

    id: str
    address: str
    gpus: float = 0
    alive: bool = True
    drained: bool = False


@dataclass(frozen=True)
class Actor:
    """What Ray knows of a server, also of one that does not answer.

    Attributes:
        state: of Ray: PENDING_CREATION, ALIVE, RESTARTING or DEAD.
        node: id; empty if it is on none.
        restarts: how often Ray has started it again.
    """

    name: str
    state: str
    node: str = ""
    pid: int = 0
    restarts: int = 0


def nodes(drained: frozenset[str] = frozenset()) -> list[Node]:
    """The nodes that are alive, the head first."""
    found = [
        Node(
            id=each["NodeID"],
            address=each["NodeManagerAddress"],
            gpus=each["Resources"].get("GPU", 0),
            drained=each["NodeID"] in drained,
        )
        for each in ray.nodes()
        if each["Alive"]
    ]
    return sorted(found, key=lambda node: (node.address, node.id))


def own_address() -> str:
    """The address of the node on which this actor runs."""
    own = ray.get_runtime_context().get_node_id()
    return next(node.address for node in nodes() if node.id == own)


def free_gpus(avoid: frozenset[str]) -> float:
    """GPUs that nobody has reserved, on all nodes but these."""
    from ray._private import state  # it has no public name

    free = state.available_resources_per_node()
    return float(sum(resources.get("GPU", 0) for node, resources in free.items() if node not in avoid))


def actors() -> dict[str, Actor]:
    """Ray's table of the stack's servers, by name. Not over `ray://`."""
    from ray._private import state  # `ray.util.state` asks Ray's dashboard, which not every cluster has

    listed = {name: ray.get_actor(name, namespace=NAMESPACE)._actor_id.hex() for name in names()}
    table = {name: state.actors(actor_id=key) for name, key in listed.items()}
    return {
        name: Actor(name, facts["State"], facts["Address"]["NodeID"], facts["Pid"], facts["NumRestarts"])
        for name, facts in table.items()
        if facts
    }


def names(kind: str = "") -> list[str]:
    """Names of the stack's actors of a kind, or of all; those that end with a number in its order."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    found = [e["name"] for e in listed if e["namespace"] == NAMESPACE and e["name"].startswith(kind)]
    return sorted(found, key=_order)


def _order(name: str) -> tuple[str, int]:
    before, _, number = name.rpartition("-")
    return (before, int(number)) if number.isdigit() else (name, 0)
