"""Which workers of a stack are started and stopped, in which order, when it is scaled and drained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.cluster.access import Access
from services.cluster.launcher import Launcher
from services.cluster.restarts import Life
from services.cluster.state import StackError, StackSettings


class Simulated(Launcher):
    """Its actors are a table: by name whether each drains.

    Attributes:
        least: fewest workers that have served at a time since the start.
        hung: names of those that answer nothing.
    """

    def __init__(self, workers: int, room: int = 100, directory: Path | None = None) -> None:
        access = Access(redis={"url": "redis://127.0.0.1", "description": "", "pid": None})
        super().__init__(StackSettings(model="m", workers=workers), access, lambda *_: None, directory=directory)
        self.hung = set[str]()
        self.table = {f"worker-{index}": False for index in range(workers)}
        self.least, self._room = workers, room

    @property
    def serving(self) -> list[str]:
        return [name for name, drains in self.table.items() if not drains]

    def names(self, kind: str = "") -> list[str]:
        return list(self.table)

    def handed_over(self, name: str) -> int:
        self.table[name] = True
        self.least = min(self.least, len(self.serving))
        return 3

    def stop(self, names: list[str]) -> None:
        for name in names:
            del self.table[name]
        self.least = min(self.least, len(self.serving))

    def _worker(self, index: int) -> Any:
        return f"worker-{index}"

    def _wait(self, actors: Any) -> dict[str, str]:
        if len(self.table) + len(actors) > self._room:
            raise StackError("no room")
        assert not set(actors) & set(self.table)
        self.table |= dict.fromkeys(actors, False)
        return {}

    def _asked(self, names: Any, question: str) -> dict[str, Any]:
        answering = [name for name in names if name not in self.hung]
        return {name: self.table[name] if question == "draining" else f"at {name}" for name in answering}


def test_a_drained_worker_is_replaced_before_it_goes() -> None:
    stack = Simulated(1)
    assert stack.drain("at worker-0", lambda: stack.handed_over("worker-0")) == 3
    assert (stack.serving, stack.least) == (["worker-1"], 1)


def test_drain_and_scale_in_any_order_leave_what_was_asked_for() -> None:
    for first in (0, 1):
        stack = Simulated(2)
        stack.drain(f"at worker-{first}", lambda: stack.handed_over(f"worker-{first}"))  # noqa: B023 (called now)
        assert len(stack.serving) == 2
        stack.scale(1)
        assert (len(stack.table), len(stack.serving), stack.least) == (1, 1, 1)


def test_a_worker_that_was_drained_by_others_does_not_count() -> None:
    stack = Simulated(2)
    stack.handed_over("worker-0")
    stack.scale(1)
    assert (stack.table, stack.least) == ({"worker-1": False}, 1)
    stack.handed_over("worker-1")
    stack.scale(2)
    assert stack.table == {"worker-0": False, "worker-2": False}


def test_one_that_is_more_than_was_asked_for_is_not_replaced() -> None:
    stack = Simulated(1)
    stack.table["worker-7"] = False
    stack.drain("at worker-0", lambda: stack.handed_over("worker-0"))
    assert stack.serving == ["worker-7"]


def test_without_room_for_another_nothing_is_drained() -> None:
    stack = Simulated(1, room=1)
    with pytest.raises(StackError, match="no room"):
        stack.drain("at worker-0", lambda: stack.handed_over("worker-0"))
    assert stack.serving == ["worker-0"]


def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    """It answers nobody, but has written down where it is."""
    stack = Simulated(2, directory=tmp_path)
    for name in (*stack.table, "worker-7"):  # the last one has ended
        Life(tmp_path, name).serves(f"at {name}")
    stack.hung.add("worker-1")

    def hand_over() -> int:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        stack.drain("at worker-1", hand_over)
    assert (stack.serving, stack.least) == (["worker-0", "worker-2"], 2)
    with pytest.raises(StackError, match="no worker of the stack is at"):
        stack.drain("at worker-7", hand_over)


def test_an_address_of_nobody() -> None:
    with pytest.raises(StackError, match=r"no worker of the stack is at 127\.0\.0\.1:1; `qaq status` shows"):
        Simulated(1).drain("127.0.0.1:1", lambda: 0)
