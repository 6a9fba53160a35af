"""Work in threads: whose turn it is, what is left out, and what becomes of work that does not end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial

import pytest

from services.common.errors import ResourceExhausted
from services.common.turns import LateError, Turns


class Gates:
    """Work that waits until it is let go, and the order in which it began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._gates: dict[str, threading.Event] = {}

    def work(self, name: str) -> Callable[[], str]:
        self._gates[name] = threading.Event()
        return partial(self._run, name)

    def _run(self, name: str) -> str:
        self.begun.append(name)
        assert self._gates[name].wait(60)
        return name

    def open(self, *names: str) -> None:
        for name in names:
            self._gates[name].set()

    async def began(self, count: int) -> None:
        while len(self.begun) < count:  # noqa: ASYNC110 (another thread says so)
            await asyncio.sleep(0.005)


@pytest.fixture
def gates() -> Gates:
    return Gates()


async def test_results_and_errors_come_back() -> None:
    turns = Turns("works", at_once=1, max_waiting=8, limit_s=60)
    assert await turns.run("a", lambda: threading.current_thread().name) == "works"
    with pytest.raises(ZeroDivisionError):
        await turns.run("a", lambda: 1 // 0)
    with pytest.raises(TimeoutError) as caught:
        await turns.run("a", partial(_fail, TimeoutError("its own")))
    assert (str(caught.value), turns.late) == ("its own", 0)


def _fail(error: Exception) -> None:
    raise error


async def test_tenants_take_turns(gates: Gates) -> None:
    turns = Turns("works", at_once=1, max_waiting=8, limit_s=60)
    names = ["a1", "a2", "a3", "b1", "c1"]
    tasks = []
    for name in names:
        tasks.append(asyncio.create_task(turns.run(name[0], gates.work(name))))
        await asyncio.sleep(0)
    await gates.began(1)
    gates.open(*names)
    assert await asyncio.gather(*tasks) == names
    assert gates.begun == ["a1", "a2", "b1", "c1", "a3"]


async def test_work_without_a_caller_is_left_out_but_keeps_its_turn_once_it_has_begun(gates: Gates) -> None:
    turns = Turns("works", at_once=1, max_waiting=8, limit_s=60)
    first, second = (asyncio.create_task(turns.run("a", gates.work(name))) for name in ("first", "second"))
    third = asyncio.create_task(turns.run("a", gates.work("third")))
    await gates.began(1)
    for task in (first, second):
        task.cancel()
    await asyncio.wait([first, second])
    gates.open("third")
    await asyncio.sleep(0.05)
    assert gates.begun == ["first"]  # its thread is not free
    gates.open("first")
    assert await third == "third"
    assert gates.begun == ["first", "third"]


async def test_too_many_that_wait_are_refused(gates: Gates) -> None:
    turns = Turns("long texts", at_once=1, max_waiting=1, limit_s=60)
    tasks = [asyncio.create_task(turns.run("a", gates.work(name))) for name in ("1", "2")]
    await gates.began(1)
    with pytest.raises(ResourceExhausted, match="1 long texts wait already"):
        await turns.run("a", gates.work("3"))
    gates.open("1", "2")
    assert await asyncio.gather(*tasks) == ["1", "2"]


async def test_a_turn_that_does_not_come_in_time(gates: Gates) -> None:
    turns = Turns("works", at_once=1, max_waiting=8, limit_s=60)
    held = asyncio.create_task(turns.run("a", gates.work("held")))
    await gates.began(1)
    turns._limit_s = 0.0
    with pytest.raises(TimeoutError) as caught:
        await turns.run("b", gates.work("late"))
    assert not isinstance(caught.value, LateError)
    gates.open("held", "late")
    assert await held == "held"
    assert gates.begun == ["held"]


async def test_work_that_does_not_end_loses_its_turn_and_is_counted(gates: Gates) -> None:
    turns = Turns("grammars", at_once=1, max_waiting=8, limit_s=0.05, most_late=2)
    for name in ("hangs", "hangs too"):
        with pytest.raises(LateError):
            await turns.run("a", gates.work(name))
    assert turns.late == 2
    with pytest.raises(ResourceExhausted, match=r"2 grammars have taken longer than 0\.05 s and have not ended"):
        await turns.run("b", gates.work("other"))
    gates.open("hangs")
    while turns.late == 2:  # noqa: ASYNC110 (its thread ends)
        await asyncio.sleep(0.005)
    turns._limit_s = 60.0
    gates.open("other")
    assert await turns.run("b", lambda: "served again") == "served again"
    gates.open("hangs too")
