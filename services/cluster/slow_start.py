"""Ray's start on a busy machine, where its own times for its first answers are too short."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from services.common.embedded_redis import free_port

PAUSE_S = 0.2
# A raylet ends if an agent has not written down its ports after 15 s.
_AGENTS = ("metrics_agent", "metrics_export", "dashboard_agent_listen", "runtime_env_agent")


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    """While this lasts, Ray's start waits so long for its node, if the node's process runs.

    Ray has no settings for it: 30 s for the node, 15 s for a node's agents.
    """
    from ray._private import services

    plain: Any = services.get_node
    start_raylet: Any = services.start_raylet
    ends = time.monotonic() + seconds

    def get_node(*args: Any, **more: Any) -> Any:
        while True:
            try:
                return plain(*args, **more)
            except RuntimeError:  # not there yet
                if time.monotonic() > ends or not _node_runs():
                    raise
                time.sleep(PAUSE_S)

    services.get_node = get_node
    services.start_raylet = _with_ports(start_raylet)
    try:
        yield
    finally:
        services.get_node, services.start_raylet = plain, start_raylet


def _with_ports(start_raylet: Callable[..., Any]) -> Callable[..., Any]:
    """Of a node whose agents' ports are chosen and written down here."""
    from ray._raylet import persist_port  # type: ignore[attr-defined]

    def start(*args: Any, **more: Any) -> Any:
        given = inspect.signature(start_raylet).bind(*args, **more).arguments
        ports = {f"{name}_port": given.get(f"{name}_port") or free_port() for name in _AGENTS}
        for name, port in ports.items():
            persist_port(given["session_dir"], given["node_id"], name, port)
        return start_raylet(*args, **more | ports)

    return start


def _node_runs() -> bool:
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # another one that has just ended
            if child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
