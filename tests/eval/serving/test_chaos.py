"""What is broken is found by its address, and what is lost is told by the fault before it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from redis.asyncio import Redis

from qaq_eval.serving import chaos
from qaq_eval.serving.chaos import Broken, Chaos, Fault, Stack, any_fault
from qaq_eval.serving.chaos_result import ChaosResult, rows, sentence
from qaq_eval.serving.history import Damage
from services.common.redis import connect
from services.common.registry import Registry
from tests.services.router.test_service import until

LISTENS = """
import grpc
server = grpc.server(None)
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
input()
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that tells the port at which it listens."""
    with subprocess.Popen([sys.executable, "-c", LISTENS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


async def test_a_victim_is_a_registered_process_that_runs(redis: Redis, process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    stack, address = Stack(redis, {"worker": 1}), f"127.0.0.1:{int(process.stdout.readline())}"

    async def lives() -> bool:
        return bool(await stack.living("worker"))

    async def lives_not() -> bool:
        return not await lives()

    assert await stack.living("worker") == []
    registry = Registry(redis)
    async with registry.announce("worker", address, {}), registry.announce("worker", "127.0.0.1:1", {}):
        await until(lives, "it is found")
        (victim,) = await stack.living("worker")
        assert (victim.pid, victim.address) == (process.pid, address)
        os.kill(process.pid, signal.SIGSTOP)
        await until(lives_not, "it is stopped")
        os.kill(process.pid, signal.SIGCONT)
        await until(lives, "it goes on")
        process.kill()
        await until(lives_not, "it is dead")


def test_damage_is_told_by_the_fault_before_it() -> None:
    killed, stopped = Fault("worker", "killed"), Fault("router", "stopped")
    made = Chaos(Stack(connect("redis://127.0.0.1:1"), {}), [], 0, lambda _: None)
    made.broken = [Broken(killed, 10.0, 12.0), Broken(stopped, 20.0, 22.0), Broken(killed, 30.0, 31.0)]
    damages = [
        Damage("token lost", 5.0, 1, "before everything"),
        Damage("token lost", 11.0, 1, ""),
        Damage("stream lost", 25.0, 1, ""),
        Damage("token repeated", 99.0, 2, ""),
    ]
    one, other = rows(made, damages)
    assert (one.role, one.how, one.times) == ("worker", "killed", 2)
    assert (one.tokens_lost, one.tokens_repeated, one.streams_lost) == (1, 2, 0)
    assert (other.role, other.times, other.streams_lost, other.tokens_lost) == ("router", 1, 1, 0)


def test_faults_at_random_are_the_same_for_a_seed() -> None:
    def first(seed: int) -> list[Fault]:
        return [fault for fault, _ in zip(any_fault(chaos.ROLES, seed), range(30), strict=False)]

    assert first(1) == first(1) != first(2)
    assert {fault.how for fault in first(1)} == {"killed", "stopped"}


def test_runs_are_added_up() -> None:
    row = {
        "role": "worker",
        "how": "killed",
        "times": 1,
        "streams_lost": 0,
        "tokens_lost": 2,
        "tokens_repeated": 0,
        "gap_median_seconds": 1.0,
        "gap_worst_seconds": 1.0,
        "gaps_seconds": [1.0],
    }
    verdict = dict.fromkeys(
        ("streams", "finished", "tokens", "streams_lost", "tokens_lost", "tokens_repeated", "tokens_out_of_order"), 1
    )
    one = ChaosResult.model_validate(
        {
            "clients": 8,
            "stream_tokens": 100,
            "preset": "fp16",
            "workers": 3,
            "routers": 2,
            "seconds": 60.0,
            "faults": [row],
            "verdict": {**verdict, "wrong_ends": 0},
            "refused": 1,
            "not_whole": None,
            "damages": ["lost"],
        }
    )
    slower = {**row, "gap_median_seconds": 3.0, "gap_worst_seconds": 3.0, "gaps_seconds": [3.0]}
    both = one + one.model_copy(update={"faults": [one.faults[0].model_validate(slower)]})
    (added,) = both.faults
    assert (added.times, added.tokens_lost, added.gaps_seconds) == (2, 4, [1.0, 3.0])
    assert (added.gap_median_seconds, added.gap_worst_seconds) == (2.0, 3.0)
    assert (both.seconds, both.refused, both.verdict.tokens_lost, both.damages) == (120.0, 2, 2, ["lost", "lost"])
    assert both.times(Fault("worker", "killed")) == 2
    assert not both.whole
    assert "1 streams lost" in sentence(one)
