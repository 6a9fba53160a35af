"""A Ray cluster of several raylets on one machine: what several machines are to Ray."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from services.cluster.slow_start import patient
from services.cluster.stack import ray_environment
from services.common.embedded_redis import free_port

HOST = "127.0.0.1"
PATIENCE_S = 240.0


class Raylets:
    """Nodes by name, in the order of their start; the first is the head.

    Attributes:
        address: of the head, host:port. client_address: ray://host:port.
    """

    def __init__(self, place: Path) -> None:
        from ray.cluster_utils import Cluster

        self._place, self._cluster = place, Cluster(shutdown_at_exit=True)
        self._client_port = free_port()
        self.nodes: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def client_address(self) -> str:
        return f"ray://{HOST}:{self._client_port}"

    def add(self, name: str, **options: Any) -> str:
        """Starts a node. Returns its id."""
        if not self.nodes:
            options |= {"ray_client_server_port": self._client_port}
        with patient(PATIENCE_S):
            node = self._cluster.add_node(
                wait=False,
                num_cpus=2,
                node_ip_address=HOST,
                object_store_memory=80 << 20,
                include_dashboard=False,
                temp_dir=str(self._place / "ray"),
                **options,
            )
        self.nodes[name] = node
        return str(node.node_id)

    def kill(self, name: str) -> None:
        """Kills a node and all that runs on it, as when a machine loses its power."""
        self._cluster.remove_node(self.nodes.pop(name), allow_graceful=False)

    def stop(self) -> None:
        self._cluster.shutdown()


@contextlib.contextmanager
def raylets(place: Path, environment: Mapping[str, str]) -> Iterator[Raylets]:
    """A cluster without nodes yet, with a token, in a directory with a short path. Stops it with the block."""
    (place / "token").write_text(secrets.token_hex(32))
    before = dict(os.environ)
    ray_environment(place)
    os.environ.update(environment, RAY_TMPDIR=str(place))  # where Ray writes down which cluster is the current one
    (place / "ray").mkdir()
    cluster = Raylets(place)
    try:
        yield cluster
    finally:
        cluster.stop()
        os.environ.clear()
        os.environ.update(before)
