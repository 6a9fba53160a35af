"""Control of a stack from other processes: start, scale, stop."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock, Timeout

from services.cluster import claim, roles, state
from services.cluster.remains import MARK
from services.cluster.stack import python_path, ray_environment
from services.cluster.state import StackError, StackSettings, StackState
from services.common.extras import require

if TYPE_CHECKING:
    from services.cluster.launcher import Launcher

STOP_TIMEOUT_S = 60.0

STACK = "stack"

Report = Callable[[str, str, float | None], None]


def up(settings: StackSettings, report: Report) -> StackState:
    """Starts a stack that outlives this process.

    Raises:
        StackError: a stack is running already, or this one did not start; nothing is left running.
        ValidationError, QAQError, ModuleNotFoundError: a setting or the machine is not fit; nothing was started.
    """
    owner = claim.current()
    if owner is not None and owner.alive:
        raise claim.taken(owner)
    report(STACK, "checking the settings", None)
    roles.check(settings)
    report(STACK, "starting its processes", None)
    with state.writing() as folder:
        log = os.open(folder / "stack.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        guard = _spawn(settings, log, attached=False)
    finally:
        os.close(log)
    with _ended(guard, report, unless_received=True):
        return _started(guard, report)


@contextlib.contextmanager
def attached(settings: StackSettings, report: Report) -> Iterator[StackState]:
    """A stack for the duration of a `with` block. It also stops if this process is killed.

    Raises:
        StackError: the stack did not start, or ended by itself while the block ran; nothing is left running.
        ValidationError, QAQError, ModuleNotFoundError: a setting or the machine is not fit; nothing was started.
    """
    report(STACK, "checking the settings", None)
    roles.check(settings)
    report(STACK, "starting its processes", None)
    guard = _spawn(settings, subprocess.DEVNULL, attached=True)
    with _ended(guard, report):
        running = _started(guard, report)
        try:
            yield running
        except Exception as error:
            if why := _why_it_ended(guard):
                raise StackError(why) from error
            raise


def down() -> bool:
    """Stops the stack of this machine, even one that is starting, or whose owner was killed. False if there is none.

    Raises:
        StackError: what describes it is damaged.
    """
    owner = claim.current()
    if owner is None:
        claim.sweep()
        return False
    if owner.alive:
        guard = psutil.Process(owner.pid)
        guard.terminate()
        try:
            guard.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired:
            guard.kill()
            guard.wait(STOP_TIMEOUT_S)
    claim.clean()
    return True


def scale(running: StackState, workers: int, report: Report) -> None:
    """Starts or stops workers until there are `workers` that serve.

    Raises:
        StackError: Ray does not answer, or a worker did not start.
    """
    with _changing(running, report) as (latest, launcher):
        launcher.scale(workers)
        state.save(latest.model_copy(update={"settings": latest.settings.model_copy(update={"workers": workers})}))


def drain(running: StackState, worker: str, hand_over: Callable[[], int], report: Report) -> int:
    """Stops the worker at an address when it has handed over what it runs. The number of workers stays.

    Args:
        hand_over: see `Launcher.drain`.
    Raises:
        StackError: Ray does not answer, no worker of the stack is there, or none could be started in its place.
    """
    with _changing(running, report) as (_, launcher):
        return launcher.drain(worker, hand_over)


@contextlib.contextmanager
def _changing(running: StackState, report: Report) -> Iterator[tuple[StackState, Launcher]]:
    """The stack as it is now, and its launcher. One command changes a stack at a time: others wait here."""
    with state.writing() as folder:
        lock = FileLock(folder / "change.lock", mode=0o600)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.acquire(timeout=0))
        except Timeout:
            report(STACK, "waiting for another command that changes it", None)
            stack.enter_context(lock.acquire())
        latest = state.load()
        if latest is None or latest.directory != running.directory:
            raise StackError("the stack was stopped meanwhile; start one with `qaq up`")
        ray_environment(running.directory)
        import ray

        from services.cluster.launcher import Launcher

        try:
            ray.init(address=running.ray_address, namespace="qaq", log_to_driver=False, logging_level="error")
        except Exception as error:
            raise StackError(f"Ray at {running.ray_address} does not answer ({error}); try `qaq down`") from error
        stack.callback(ray.shutdown)
        yield latest, Launcher(latest.settings, latest.access, report, directory=latest.directory)


def _spawn(settings: StackSettings, errors: int, *, attached: bool) -> subprocess.Popen[str]:
    require("ray")  # in this process, which can say what to install
    guard = subprocess.Popen(
        [sys.executable, "-m", "services.cluster.guard"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        # Without the mark of a stack in which this process may run: it would end with that one.
        env={k: v for k, v in os.environ.items() if k != MARK} | {"PYTHONPATH": python_path()},
        text=True,
        start_new_session=True,
    )
    _tell(guard, json.dumps({"settings": settings.model_dump(), "attached": attached}))
    return guard


def _started(guard: subprocess.Popen[str], report: Report) -> StackState:
    """Follows the events of the start until the stack is ready, and says that it was received."""
    assert guard.stdout is not None
    for line in guard.stdout:
        event = json.loads(line)
        if "ready" in event:
            _tell(guard, "received")
            report(STACK, "ready", 1.0)
            return StackState.model_validate(event["ready"])
        if "failed" in event:
            raise StackError(event["failed"])
        report(*event["report"])
    code = guard.wait()
    if code == 0:
        raise StackError("the stack was stopped while it started")
    raise StackError(f"the stack's process ended with code {code}; see {state.directory() / 'stack.log'}")


def _why_it_ended(guard: subprocess.Popen[str]) -> str:
    """Why the stack has ended by itself; empty if it runs."""
    assert guard.stdout is not None
    if not select.select([guard.stdout], [], [], 0)[0]:
        return ""
    event = json.loads(guard.stdout.readline() or "{}")
    return str(event.get("ended", "the stack's process has ended, killed or crashed, and the stack with it"))


def _tell(guard: subprocess.Popen[str], line: str) -> None:
    assert guard.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its end is noticed where its events are read
        guard.stdin.write(line + "\n")
        guard.stdin.flush()


@contextlib.contextmanager
def _ended(guard: subprocess.Popen[str], report: Report, *, unless_received: bool = False) -> Iterator[None]:
    """Ends the stack with the block, or only if the block fails. SIGTERM and SIGHUP end the block as Ctrl-C does.

    The guard ends its stack alone, so a second signal only ends the waiting for it.
    """
    received = False
    try:
        with _signals_raise():
            yield
        received = unless_received
    finally:
        if not received and guard.poll() is None:
            report(STACK, "stopping Redis, Ray and the servers", None)
            with contextlib.suppress(ProcessLookupError):
                guard.terminate()
            try:
                guard.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                guard.kill()
                guard.wait()
            report(STACK, "stopped", 1.0)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
