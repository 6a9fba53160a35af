"""A stack on a Ray cluster that is there: `qaq up --address`. The same actors as on one machine, on its nodes.

Nothing of it depends on the process that started it: Ray's head has the actors, and the controller the settings.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from services.cluster import control, roles, state
from services.cluster.access import Access
from services.cluster.handed import Handed
from services.cluster.keys import StackKeys
from services.cluster.stack import chosen_secret
from services.cluster.state import StackError, StackSettings, StackState
from services.common.certificates import issue
from services.common.identity import is_loopback
from services.common.redis import redacted
from services.common.redis_url import check_redis_url
from services.common.roles import Role
from services.common.settings import CommonSettings

if TYPE_CHECKING:
    from services.cluster.nodes import Node

ROLES: tuple[Role, ...] = ("router", "worker", "originals", "gateway", "operator")

Report = Callable[[str, str, float | None], None]


def up(
    settings: StackSettings, address: str, redis_url: str | None, hosts: Sequence[str], report: Report
) -> StackState:
    """Starts a stack on the Ray cluster at an address and returns when it can answer requests.

    Args:
        address: host:port of the head, on a machine of the cluster; ray://host:port elsewhere.
        redis_url: a Redis that all nodes reach.
        hosts: further names at which clients look for router and gateway.
    Raises:
        StackError: the message says what to change. Nothing is left running.
    """
    redis = _redis(redis_url)
    control.refuse_a_second()
    report(control.STACK, "checking the settings", None)
    roles.check_settings(settings)
    _check_token(address)
    secret = chosen_secret()
    control.reach(address)
    from services.cluster import actors, controller, nodes

    report(control.STACK, f"connecting to Ray at {address}", None)
    with controller.connected(address):
        if controller.NAME in nodes.names():
            raise StackError(f"a stack runs on the Ray cluster at {address} already; stop it with `qaq down --address`")
        found = nodes.nodes()
        _check_nodes(settings, redis, found)
        with state.writing() as folder:
            directory = folder / "tls" if settings.tls else None
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)
                names = [*hosts, *(node.address for node in found)]
                issue(directory, [(role, name) for role in ("router", "gateway") for name in names])
        keys = _keys(settings)
        access = Access(redis={"url": redis, "description": redacted(redis), "pid": None}, secret=secret)
        plan = roles.plan(settings, access, {} if settings.keys else {"tenants_file": None})
        changes = controller.launch(settings, plan, None, _handed(directory, keys))
        try:
            started = controller.call(changes, "start", report=report)
        except BaseException:
            actors.stop(nodes.names())
            raise
        running = StackState(
            pid=0,
            born=0.0,
            directory=state.directory(),
            settings=settings,
            router=started["router"],
            gateway=started.get("gateway"),
            ray_address=address,
            redis=access.redis,
            certificates=directory,
            secret=secret,
            keys=keys.directory if keys else None,
            address=address,
        )
        state.save(running)
        report(control.STACK, "ready", 1.0)
        return running


def down(address: str) -> bool:
    """Stops the stack on the Ray cluster at an address. False if there is none.

    Raises:
        StackError: Ray does not answer.
    """
    control.reach(address)
    from services.cluster import actors, controller, nodes

    with controller.connected(address):
        names = nodes.names()
        # The controller first: it would start others in the middle of a change.
        actors.stop([name for name in names if name == controller.NAME])
        actors.stop([name for name in names if name != controller.NAME])
    deployed = state.load()
    if deployed is not None and deployed.address == address:
        state.forget()
        shutil.rmtree(state.directory() / "tls", ignore_errors=True)
    return bool(names)


def _redis(given: str | None) -> str:
    """The URL of the Redis of all nodes.

    Raises:
        StackError: there is none.
    """
    url = given or os.environ.get("QAQ_REDIS_URL")
    if not url:
        raise StackError(
            "a stack on several machines needs a Redis that all of them reach: give --redis-url, or set QAQ_REDIS_URL"
        )
    return check_redis_url(url)


def _check_token(address: str) -> None:
    """Raises:
    StackError: everybody who reaches the cluster could take the stack's keys, and that was not asked for.
    """
    host = urlsplit(address if "://" in address else f"ray://{address}").hostname or ""
    if is_loopback(host) or os.environ.get("RAY_AUTH_MODE") == "token" or CommonSettings().insecure:
        return
    raise StackError(
        f"Ray at {address} asks for no token, as far as this environment says: whoever reaches it runs what they like "
        "there, and has the stack's keys. Start it with RAY_AUTH_MODE=token and set that here too, or QAQ_INSECURE=1"
    )


def _check_nodes(settings: StackSettings, redis: str, nodes: Sequence[Node]) -> None:
    """Raises:
    StackError: the nodes are not fit for what is asked for.
    """
    apart = {node.address for node in nodes}
    if len(apart) > 1 and is_loopback(urlsplit(redis).hostname or ""):
        raise StackError(
            f"Redis at {redacted(redis)} is on one machine alone, and the cluster has {len(apart)}; give --redis-url "
            "an address that all of them reach"
        )
    gpus = sum(node.gpus for node in nodes)
    workers = sum(served.workers for served in settings.models if served.device.startswith("cuda"))
    if workers > gpus:
        raise StackError(
            f"{workers} workers need a GPU each, and the cluster's nodes have {gpus:g}; take fewer --workers"
        )
    for served in settings.models:
        if served.device.startswith("cuda:"):
            raise StackError(f"Ray chooses the workers' devices itself: take cuda, not {served.device}")
    if not settings.tls and not CommonSettings().insecure and not all(is_loopback(each) for each in apart):
        raise StackError("--no-tls is for one machine: leave it out, or set QAQ_INSECURE=1 to be open to that network")


def _keys(settings: StackSettings) -> StackKeys | None:
    """The stack's keys; None if the router asks for none, or a tenants file is on every node.

    Raises:
        ConfigError: the tenants file cannot be used.
    """
    if not settings.keys or os.environ.get("QAQ_TENANTS_FILE"):
        return None
    keys = StackKeys(state.directory())
    keys.make()
    return keys


def _handed(directory: Path | None, keys: StackKeys | None) -> Mapping[Role, Handed]:
    """By role, what its server gets."""
    tenants = keys.tenants.read_bytes() if keys else None
    return {role: Handed.of(directory, role, tenants if role == "router" else None) for role in ROLES}
