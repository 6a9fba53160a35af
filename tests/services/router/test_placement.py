from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from qaq.v1 import common_pb2

from qaq_core.base.errors import ConfigError
from services.router.placement import make, place
from services.router.session import Session

DEFAULT = "affinity,prefix,load"
LONG = list(range(200))


@dataclass(frozen=True)
class Told:
    address: str
    load: int = 0
    kv_bytes: int = 0
    memory_use: float = 0.0


def session(worker: str = "") -> Session:
    return Session("s", "m", common_pb2.CacheParams(), True, worker, 0.0)


def chosen(policies: str, holder: str, workers: Sequence[Told]) -> str:
    picked = place(session(holder), [1, 2, 3], workers, make(policies))
    assert picked is not None
    return picked.address


@pytest.mark.parametrize(
    ("holder", "workers", "address"),
    [
        ("b", [Told("a"), Told("b", load=8)], "b"),
        ("b", [Told("a"), Told("b", load=9)], "a"),  # it can be loaded from its pages
        ("gone", [Told("a", load=2), Told("b", load=1)], "b"),
        ("", [Told("a", load=1, kv_bytes=5), Told("b", load=1, kv_bytes=4)], "b"),
        ("", [Told("b"), Told("a")], "a"),
    ],
)
def test_affinity_comes_before_load(holder: str, workers: list[Told], address: str) -> None:
    assert chosen(DEFAULT, holder, workers) == address


def test_the_same_beginning_goes_to_the_same_worker_while_it_has_room() -> None:
    policies = make(DEFAULT)

    def where(prompt: list[int], *workers: Told) -> str:
        picked = place(session(), prompt, workers, policies)
        assert picked is not None
        return picked.address

    assert where(LONG, Told("a", load=1), Told("b")) == "b"
    assert where([*LONG[:64], 7], Told("a"), Told("b", load=1)) == "b"
    assert where([9, *LONG], Told("a"), Told("b", load=1)) == "a"
    # A hot prefix spreads: who is busy passes it on, and the next ones follow.
    assert where(LONG, Told("a"), Told("b", load=2)) == "a"
    assert where(LONG, Told("a", load=1), Told("b")) == "a"
    # What is too short to be a page is nobody's.
    assert [where([1, 2], Told("a", load=n), Told("b", load=1 - n)) for n in (1, 0)] == ["b", "a"]


def test_least_memory() -> None:
    full, free = Told("a", memory_use=0.9), Told("b", load=3, memory_use=0.2)
    assert chosen("affinity,memory", "", [full, free]) == "b"
    assert chosen("affinity,memory", "", [Told("a"), Told("b", load=3)]) == "a"


def test_no_worker_is_no_place() -> None:
    assert place(session(), LONG, [], make(DEFAULT)) is None


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ConfigError, match="use some of affinity, prefix"):
        make("affinity,coin")
