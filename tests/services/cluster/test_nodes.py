"""The order of servers' names."""

from __future__ import annotations

from services.cluster.nodes import _order


def test_names_are_in_the_order_of_their_numbers() -> None:
    names = ["worker-10", "worker-b-1", "worker-2", "router", "worker-b-0", "originals-0", "controller"]
    assert sorted(names, key=_order) == [
        *("controller", "originals-0", "router"),
        *("worker-2", "worker-10", "worker-b-0", "worker-b-1"),
    ]
