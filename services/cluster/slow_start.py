"""Ray's start on a busy machine, where its own 30 s for the first answer of its node are too short."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import psutil

PAUSE_S = 0.2


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    """While this lasts, Ray's start waits so long for its node, if the node's process runs. It has no setting."""
    from ray._private import services

    plain: Any = services.get_node
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
    try:
        yield
    finally:
        services.get_node = plain


def _node_runs() -> bool:
    with contextlib.suppress(psutil.Error):
        return any(child.name() == "raylet" for child in psutil.Process().children() if child.status() != "zombie")
    return False
