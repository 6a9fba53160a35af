from __future__ import annotations

from dataclasses import dataclass

import pytest
from qaq.v1 import common_pb2

from services.router.placement import place
from services.router.sessions import Session


@dataclass(frozen=True)
class Told:
    address: str
    load: int = 0
    kv_bytes: int = 0


def session(worker: str = "") -> Session:
    return Session("s", "m", common_pb2.CacheParams(), True, worker, 0.0)


@pytest.mark.parametrize(
    ("holder", "workers", "chosen"),
    [
        ("b", [Told("a"), Told("b", load=9)], "b"),
        ("gone", [Told("a", load=2), Told("b", load=1)], "b"),
        ("", [Told("a", load=1, kv_bytes=5), Told("b", load=1, kv_bytes=4)], "b"),
        ("", [Told("b"), Told("a")], "a"),
    ],
)
def test_affinity_comes_before_load(holder: str, workers: list[Told], chosen: str) -> None:
    picked = place(session(holder), workers)
    assert picked is not None
    assert picked.address == chosen


def test_no_worker_is_no_place() -> None:
    assert place(session(), []) is None
