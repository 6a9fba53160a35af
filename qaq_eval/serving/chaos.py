"""Breaks the processes of a stack while clients stream, and says what the clients lost.

One fault at a time: a process is killed (SIGKILL) or stopped for some seconds (SIGSTOP, SIGCONT). The next one follows
as soon as the stack is whole again and every client has heard a token. `qaq bench serve --chaos` and `make faults` are
two entries to this.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import psutil
from redis.asyncio import Redis
from redis.exceptions import RedisError

from qaq_eval.serving.listeners import Listener
from services.common.registry import Kind, Registry

Role = Literal["worker", "cache service", "router", "Redis"]
How = Literal["killed", "stopped"]
ROLES: tuple[Role, ...] = get_args(Role)

STOP_S = (2.0, 14.0)
"""How long a process is stopped: some wake up before anybody has noticed, some after all have."""
PAUSE_S = (0.5, 3.0)
RECOVERY_S = 300.0
POLL_S = 0.2
LOOK_S = 2.0

_KINDS: Mapping[str, Kind] = {"worker": "worker", "cache service": "originals", "router": "router"}

Report = Callable[[str], None]


class NotWhole(Exception):
    """The stack has not recovered. The message says from what, and what is missing."""


@dataclass(frozen=True)
class Fault:
    role: Role
    how: How

    def __str__(self) -> str:
        return f"{self.role} {self.how}"


@dataclass(frozen=True)
class Victim:
    """A process: its pid, and the address at which it listens."""

    role: Role
    pid: int
    address: str = ""


@dataclass(frozen=True)
class Broken:
    """A fault that was made: when, and when the stack was whole again; in seconds of time.monotonic."""

    fault: Fault
    began: float
    whole: float


class Stack:
    """The processes of a stack on this machine, found in its registry. Something else starts them again.

    Args:
        expected: how many of each role make a whole stack.
    """

    def __init__(self, redis: Redis, expected: Mapping[Role, int]) -> None:
        self.expected = expected
        self._registry = Registry(redis)
        self._pids: dict[str, int] = {}
        self._looked_at = -LOOK_S

    async def living(self, role: Role) -> list[Victim]:
        """Its processes that are registered, run, and are not stopped."""
        try:
            members = await self._registry.members(_KINDS[role])
        except RedisError:
            return []
        addresses = [member.address for member in members]
        if any(not _runs(self._pids.get(address, 0)) for address in addresses):
            self._look()
        victims = [Victim(role, self._pids.get(address, 0), address) for address in addresses]
        return [victim for victim in victims if _runs(victim.pid)]

    async def killed(self, victim: Victim) -> None:
        """Is called when a process was killed."""

    def _look(self) -> None:
        """Finds the process of each address, at most every `LOOK_S`: that takes a look at every process there is."""
        if time.monotonic() - self._looked_at > LOOK_S:
            self._pids = listening()
            self._looked_at = time.monotonic()


class Chaos:
    """Breaks a stack under listeners.

    Attributes:
        broken: what was made, in order.
    """

    def __init__(self, stack: Stack, listeners: Sequence[Listener], seed: int, report: Report) -> None:
        self._stack, self._listeners, self._report = stack, listeners, report
        self._rng = random.Random(seed)
        self.broken: list[Broken] = []

    async def run(self, faults: Iterable[Fault], seconds: float) -> None:
        """Makes faults until there are no more, or the time is over, which begins when the stack is whole.

        Raises:
            NotWhole: the stack did not recover from one.
        """
        await self._recovered("the start", time.monotonic())
        ends = time.monotonic() + seconds
        for fault in faults:
            if time.monotonic() >= ends:
                break
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))
            victim = await self._victim(fault.role)
            began = time.monotonic()
            await self._break(fault, victim)
            broken = Broken(fault, began, await self._recovered(str(fault), time.monotonic()))
            self.broken.append(broken)
            self._report(f"{len(self.broken)}. {fault} ({victim.address or victim.pid}): {self.gap(broken):.1f} s")

    def gap(self, broken: Broken) -> float:
        """The longest silence of a stream between the fault and the moment at which the stack was whole again."""
        histories = (history for listener in self._listeners for history in listener.histories)
        return max((history.longest_gap(broken.began, broken.whole) for history in histories), default=0.0)

    async def _victim(self, role: Role) -> Victim:
        """One of a role. Whole as the stack was a moment ago, a process may just miss a heartbeat.

        Raises:
            NotWhole: there is none.
        """
        ends = time.monotonic() + RECOVERY_S
        while not (living := await self._stack.living(role)):
            if time.monotonic() > ends:
                raise NotWhole(f"no {role} was left to be broken")
            await asyncio.sleep(POLL_S)
        return self._rng.choice(living)

    async def _break(self, fault: Fault, victim: Victim) -> None:
        if fault.how == "killed":
            os.kill(victim.pid, signal.SIGKILL)
            await self._stack.killed(victim)
            return
        os.kill(victim.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._rng.uniform(*STOP_S))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGCONT)

    async def _recovered(self, after: str, since: float) -> float:
        """Waits until everything runs and every client has heard a token after `since`. Returns that moment."""
        ends = time.monotonic() + RECOVERY_S
        while True:
            missing = [role for role, count in self._stack.expected.items() if await self._fewer(role, count)]
            silent = [listener.name for listener in self._listeners if not listener.heard_since(since)]
            if not missing and not silent:
                return time.monotonic()
            if time.monotonic() > ends:
                raise NotWhole(
                    f"the stack has not recovered from: {after}. Missing: {', '.join(missing) or 'nothing'}; "
                    f"without a token for {RECOVERY_S:.0f} s: {', '.join(silent) or 'nobody'}"
                )
            await asyncio.sleep(POLL_S)

    async def _fewer(self, role: Role, count: int) -> bool:
        return len(await self._stack.living(role)) < count


def any_fault(roles: Sequence[Role], seed: int) -> Iterable[Fault]:
    """Kills and stops of the roles at random, without end."""
    rng = random.Random(seed)
    while True:
        yield Fault(rng.choice(roles), rng.choice(get_args(How)))


def listening() -> dict[str, int]:
    """The process that listens at each TCP address of this machine, host:port, as far as it may be known."""
    connections = psutil.net_connections(kind="tcp")
    found = [c for c in connections if c.status == psutil.CONN_LISTEN and c.pid]
    # gRPC listens at an IPv4 address with a socket of IPv6.
    return {f"{c.laddr.ip.removeprefix('::ffff:')}:{c.laddr.port}": c.pid for c in found}


def _runs(pid: int) -> bool:
    try:
        return pid > 0 and psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
