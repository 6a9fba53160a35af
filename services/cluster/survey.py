"""What runs where on a cluster of several machines, and why what is wanted is not there: by its controller."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qaq_core.models import name_of
from services.cluster import nodes
from services.cluster.fleet import key_of, of_worker
from services.cluster.handed import Handed, in_memory
from services.cluster.nodes import Actor, Node
from services.cluster.state import StackSettings
from services.cluster.status import StackStatus, status_at
from services.common.identity import Identity

if TYPE_CHECKING:
    from services.cluster.launcher import Launcher
    from services.cluster.roles import Plan

ASK_S = 3.0


@dataclass(frozen=True)
class Server:
    """A server of the stack.

    Attributes:
        address: host:port; empty while it does not serve.
        node: id of its node; empty if it is on none.
        restarts: how often Ray has started it again.
        why: why it does not serve; empty if it does.
    """

    name: str
    address: str
    node: str
    restarts: int
    why: str


@dataclass(frozen=True)
class Survey:
    """The state of a stack.

    Attributes:
        settings: with the number of workers that is wanted.
        redis: where it is, without its password.
        why: why the servers did not tell their load; empty if they did.
    """

    settings: StackSettings
    servers: list[Server]
    nodes: list[Node]
    load: StackStatus
    redis: str
    why: str = ""


def take(launcher: Launcher, plan: Plan, operator: Handed) -> Survey:
    """Asks Ray what there is, and each server how it is."""
    from redis.exceptions import RedisError

    from services.cluster.answers import ask
    from services.common.redis import redacted

    table = nodes.actors()
    told = ask([name for name in table if name != "controller"], "facts", ASK_S)
    gpus = nodes.free_gpus(launcher.drained)
    servers = [
        _server(actor, told.get(name), launcher.settings, gpus) for name, actor in table.items() if name != "controller"
    ]
    url, load, why = plan.originals.redis_url.get_secret_value(), StackStatus([], {}, {}), ""
    try:
        load = asyncio.run(status_at(url, _identity(operator)))
    except RedisError as error:
        why = f"Redis at {redacted(url)} does not answer ({error})"
    return Survey(launcher.settings, servers, nodes.nodes(launcher.drained), load, redacted(url), why)


def _server(actor: Actor, told: tuple[str, str] | None, settings: StackSettings, gpus: float) -> Server:
    address, failure = told or ("", "")
    why = "" if address else _why(actor, failure, told is None, settings, gpus)
    return Server(actor.name, address, actor.node, actor.restarts, why)


def _why(actor: Actor, failure: str, silent: bool, settings: StackSettings, gpus: float) -> str:
    """Why a server does not serve."""
    if actor.state in ("PENDING_CREATION", "DEPENDENCIES_UNREADY", "RESTARTING"):
        again = "its process or its node has died; " if actor.state == "RESTARTING" else ""
        key = of_worker(actor.name)
        device = next((each.device for each in settings.models if key == key_of(name_of(each.model))), settings.device)
        if key is not None and device.startswith("cuda") and gpus < 1:
            return f"{again}no node has a free GPU"
        if actor.name.startswith("worker") and settings.worker_cpus:
            return f"{again}it waits for a node with {settings.worker_cpus:g} free CPUs, or starts"
        return f"{again}it starts"
    if failure:
        return failure
    return "does not answer" if silent else "it starts"


def _identity(operator: Handed) -> Identity | None:
    if operator.pems is None:
        return None
    return Identity(*(in_memory(f"operator {index}", pem or b"") for index, pem in enumerate(operator.pems)))
