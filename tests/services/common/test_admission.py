"""Who goes next, who waits, and who is refused."""

from __future__ import annotations

import asyncio

import pytest

from services.common.admission import Admission
from services.common.errors import ResourceExhausted


class Crowd:
    """Generations of several tenants, and the order in which they got their places."""

    def __init__(self, most: int = 100, capacity: int = 1) -> None:
        self.capacity = capacity
        self.admission = Admission(most, lambda: self.capacity)
        self.order: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}

    async def send(self, name: str, tenant: str = "", slots: int = 1, timeout_s: float = 60) -> asyncio.Task[None]:
        """Starts a generation; returns when it runs, waits or was refused."""
        self._ends[name] = asyncio.Event()

        async def generate() -> None:
            async with self.admission.place(tenant or name[0], slots, timeout_s):
                self.order.append(name)
                await self._ends[name].wait()

        task = asyncio.create_task(generate())
        await self.settle()
        return task

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self.settle()

    @staticmethod
    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)


async def test_tenants_take_turns_whatever_one_sends() -> None:
    crowd = Crowd()
    names = ["a1", "a2", "a3", "a4", "b1", "b2", "c1"]
    tasks = [await crowd.send(name) for name in names]
    for name in ("a1", "a2", "b1", "c1", "a3", "b2", "a4"):
        assert crowd.order[-1] == name
        await crowd.end(name)
    assert sorted(crowd.order) == names
    await asyncio.gather(*tasks)
    assert crowd.admission.waiting == 0


async def test_as_many_run_as_the_workers_take() -> None:
    crowd = Crowd(capacity=2)
    for name in ("a1", "a2", "a3", "a4"):
        await crowd.send(name)
    assert crowd.order == ["a1", "a2"]
    crowd.capacity = 3
    crowd.admission.wake()
    await crowd.settle()
    assert crowd.order == ["a1", "a2", "a3"]
    crowd.capacity = 1
    await crowd.end("a1")
    await crowd.end("a2")
    assert len(crowd.order) == 3
    await crowd.end("a3")
    assert crowd.order[-1] == "a4"


async def test_several_choices_take_several_places_and_are_not_overtaken() -> None:
    crowd = Crowd(capacity=3)
    await crowd.send("a1")
    await crowd.send("b3", slots=3)
    await crowd.send("c1")
    assert crowd.order == ["a1"]
    await crowd.end("a1")
    assert crowd.order == ["a1", "b3"]
    await crowd.end("b3")
    assert crowd.order == ["a1", "b3", "c1"]


async def test_what_is_larger_than_all_workers_goes_alone() -> None:
    crowd = Crowd(capacity=1)
    await crowd.send("a1", slots=4)
    await crowd.send("b1")
    assert crowd.order == ["a1"]
    await crowd.end("a1")
    assert crowd.order == ["a1", "b1"]


async def test_a_full_queue_refuses_and_whoever_sends_most_first() -> None:
    crowd = Crowd(most=3)
    await crowd.send("a0")
    waiting = [await crowd.send(name) for name in ("a1", "a2", "a3")]
    with pytest.raises(ResourceExhausted, match="3 generations wait already") as refused:
        await (await crowd.send("a4"))
    assert refused.value.retry_after_ms
    with pytest.raises(ResourceExhausted):
        crowd.admission.check("a")
    crowd.admission.check("b")
    await crowd.send("b1")
    with pytest.raises(ResourceExhausted):
        await waiting[2]
    assert crowd.admission.waiting == 3
    with pytest.raises(ResourceExhausted):
        await (await crowd.send("b2"))
    for name in ("a0", "a1", "b1", "a2"):
        await crowd.end(name)
    assert crowd.order == ["a0", "a1", "b1", "a2"]


async def test_who_gives_up_leaves_the_queue() -> None:
    crowd = Crowd()
    await crowd.send("a1")
    gone, late = await crowd.send("a2"), await crowd.send("b1", timeout_s=0.01)
    await crowd.send("c1")
    gone.cancel()
    with pytest.raises(TimeoutError):
        await late
    assert crowd.admission.waiting == 1
    await crowd.end("a1")
    assert crowd.order == ["a1", "c1"]
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_a_place_that_comes_too_late_is_the_next_ones() -> None:
    crowd = Crowd()
    await crowd.send("a1")
    gone = await crowd.send("b1")
    await crowd.send("c1")
    crowd._ends["a1"].set()
    while crowd.admission.waiting == 2:  # noqa: ASYNC110 (step by step)
        await asyncio.sleep(0)
    assert crowd.order == ["a1"], "b1 has noticed already that its turn has come"
    gone.cancel()
    await crowd.settle()
    assert crowd.order == ["a1", "c1"]
    await crowd.end("c1")
    assert crowd.admission.waiting == 0


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("first", ["a1", "b1"])
async def test_places_come_back_whenever_a_generation_is_cancelled(turns: int, first: str) -> None:
    """The place that "a0" gives up goes on while one that waits for it is cancelled, some turns of the loop earlier or
    later."""
    crowd = Crowd(most=3)
    tasks = {name: await crowd.send(name) for name in ("a0", "a1", "b1", "b2")}
    crowd._ends["a0"].set()
    for _ in range(turns):
        await asyncio.sleep(0)
    tasks[first].cancel()
    for name in ("a1", "b1", "b2"):
        await crowd.end(name)
    await asyncio.wait(tasks.values())
    assert crowd.admission.waiting == crowd.admission.taken == 0
    assert crowd.order[-1] != "a0", "the others run"
    assert all(task.cancelled() or task.exception() is None for task in tasks.values())


async def test_the_place_of_a_cancelled_one_goes_to_the_next_in_the_same_turn_of_the_loop() -> None:
    crowd = Crowd()
    await crowd.send("a1")
    gone = await crowd.send("b1")
    await crowd.send("c1")
    gone.cancel()
    crowd.capacity = 2
    crowd.admission.wake()
    await crowd.settle()
    assert crowd.order == ["a1", "c1"]
    for name in ("a1", "c1"):
        await crowd.end(name)
    assert crowd.admission.waiting == crowd.admission.taken == 0


async def test_one_that_is_refused_and_cancelled_at_once_leaves_the_queue() -> None:
    crowd = Crowd(most=2)
    await crowd.send("a0")
    _, late = await crowd.send("a1"), await crowd.send("a2")
    late.cancel()
    await crowd.send("b1")
    assert crowd.admission.waiting == 2
    for name in ("a0", "a1", "b1"):
        await crowd.end(name)
    assert crowd.order == ["a0", "a1", "b1"]
    assert crowd.admission.taken == 0
