"""How many workers a model gets, by its load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cluster.autoscaler import QUEUE_S, RETRY_S, Autoscaler, Autoscaling, Load
from services.cluster.fleet import Fleet
from services.cluster.state import ServedModel, StackError

IDLE_S = 60.0
EACH = 8


def load(workers: int, waiting: int = 0, running: int = 0, short: int = 0) -> Load:
    return Load(workers, waiting, running, workers * EACH, short)


def decided(wanted: int, seen: Load, seconds: float, least: int = 1, most: int = 3) -> int:
    """The number of workers after the same load for some seconds."""
    scaler = Autoscaler(IDLE_S)
    scaler.decide(least, most, wanted, seen, 100.0)
    return scaler.decide(least, most, wanted, seen, 100.0 + seconds)[0]


@pytest.mark.parametrize(
    ("wanted", "seen", "seconds", "workers"),
    [
        (1, load(1, waiting=1, running=8), QUEUE_S - 0.1, 1),  # the queue may still empty
        (1, load(1, waiting=1, running=8), QUEUE_S, 2),
        (1, load(1, waiting=12, running=8), QUEUE_S, 3),  # as many as those that wait fill
        (1, load(1, waiting=100, running=8), QUEUE_S, 3),
        (3, load(3, waiting=100, running=24), 1000, 3),
        (1, load(1, running=8), 1000, 1),  # full, and nobody waits
        (1, load(1, running=2, short=1), QUEUE_S, 2),
        (2, load(2, running=2, short=1), 1000, 2),  # one has room
        (1, load(1, short=1), 1000, 1),  # of sessions that rest
        (2, load(1, waiting=9, running=8), 1000, 2),  # one is coming
        (1, load(0, waiting=9), 1000, 1),
        (3, load(3, running=8), IDLE_S - 0.1, 3),
        (3, load(3, running=8), IDLE_S, 2),  # one at a time
        (3, load(3, running=9), 1000, 3),  # more than half of what two decode
        (2, load(2), IDLE_S, 1),
        (1, load(1), 1000, 1),
        (5, load(5, waiting=9, running=8), 0, 3),  # other bounds
    ],
)
def test_what_a_load_asks_for(wanted: int, seen: Load, seconds: float, workers: int) -> None:
    assert decided(wanted, seen, seconds) == workers


def test_a_change_begins_anew() -> None:
    scaler, busy = Autoscaler(IDLE_S), load(2, waiting=1, running=16)
    assert scaler.decide(1, 9, 2, busy, 0.0)[0] == 2
    assert scaler.decide(1, 9, 2, busy, QUEUE_S) == (3, "1 generations wait")
    assert scaler.decide(1, 9, 3, load(3, waiting=1, running=24), QUEUE_S + 0.5)[0] == 3
    # Somebody has taken one away; the queue that stood before is not counted.
    assert scaler.decide(1, 9, 2, busy, 2 * QUEUE_S)[0] == 2


LOADS = st.builds(load, st.integers(0, 8), st.integers(0, 50), st.integers(0, 64), st.integers(0, 8))


@given(
    st.integers(1, 4),
    st.integers(0, 4),
    st.lists(st.tuples(LOADS, st.floats(0.1, 100)), max_size=40),
)
def test_bounds_are_kept_and_steps_down_are_single(least: int, room: int, seen: list[tuple[Load, float]]) -> None:
    scaler, wanted, now, changed = Autoscaler(IDLE_S), least, 0.0, 0.0
    for each, seconds in seen:
        now += seconds
        workers, why = scaler.decide(least, least + room, wanted, each, now)
        assert least <= workers <= least + room
        assert workers >= wanted - 1
        assert bool(why) == (workers != wanted)
        if workers != wanted:
            assert now - changed >= (QUEUE_S if workers > wanted else IDLE_S) or changed == 0.0
            changed = now
        wanted = workers


class Stack:
    """A launcher whose workers are there at once, or not at all."""

    def __init__(self, seen: Load, full: bool = False) -> None:
        self.fleet = Fleet(ServedModel(model="m", workers=1, max_workers=3, idle_s=IDLE_S))
        self.elastic, self.seen, self.full = [self.fleet], seen, full
        self.asked: list[int] = []

    def load(self, fleet: Fleet) -> Load:
        return self.seen

    def resize(self, fleet: Fleet, workers: int) -> None:
        self.asked.append(workers)
        if self.full:
            raise StackError("no node has a free GPU")
        fleet.want(workers)


def at_once(what: Callable[[], Any]) -> Any:
    return what()


def test_a_stack_follows_its_load() -> None:
    stack: Any = Stack(load(1, waiting=1, running=8))
    scaling = Autoscaling(stack, at_once)
    for now in (0.0, QUEUE_S):
        scaling.look(now)
    assert scaling.last == {"m": "1 to 2 workers: 1 generations wait"}
    stack.seen = load(2)
    for now in (10.0, 10.0 + IDLE_S, 11.0 + IDLE_S):
        scaling.look(now)
    assert stack.asked == [2, 1]
    assert (stack.fleet.least, stack.fleet.most, stack.fleet.served.workers) == (1, 3, 1)


def test_what_cannot_be_placed_is_tried_again_later() -> None:
    stack: Any = Stack(load(1, waiting=1, running=8), full=True)
    scaling = Autoscaling(stack, at_once)
    for now in (0.0, QUEUE_S, QUEUE_S + 1, QUEUE_S + RETRY_S - 1):
        scaling.look(now)
    assert stack.asked == [2]
    assert scaling.last == {"m": "no 2 workers: no node has a free GPU"}
    scaling.look(QUEUE_S + RETRY_S)
    assert stack.asked == [2, 2]


def test_a_command_that_was_faster_wins() -> None:
    stack: Any = Stack(load(1, waiting=1, running=8))

    def after_a_command(what: Callable[[], Any]) -> Any:
        stack.fleet.want(3)
        return what()

    scaling = Autoscaling(stack, after_a_command)
    for now in (0.0, QUEUE_S):
        scaling.look(now)
    assert (stack.asked, scaling.last) == ([], {})


def test_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="max_workers is 2, and workers is 3"):
        ServedModel(model="m", workers=3, max_workers=2)
