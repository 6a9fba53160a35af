"""Control of a stack from other processes: start, scale, stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import psutil

from services.cluster import claim, roles, state
from services.cluster.remains import MARK
from services.cluster.stack import python_path, ray_environment
from services.cluster.state import StackError, StackSettings, StackState
from services.common.extras import require

STOP_TIMEOUT_S = 60.0

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
    roles.check(settings)
    with state.writing() as folder:
        log = os.open(folder / "stack.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        guard = _spawn(settings, log, attached=False)
    finally:
        os.close(log)
    with _ended(guard, unless_received=True):
        return _started(guard, report)


@contextlib.contextmanager
def attached(settings: StackSettings, report: Report) -> Iterator[StackState]:
    """A stack for the duration of a `with` block. It also stops if this process is killed.

    Raises:
        StackError: the stack did not start; nothing is left running.
        ValidationError, QAQError, ModuleNotFoundError: a setting or the machine is not fit; nothing was started.
    """
    roles.check(settings)
    guard = _spawn(settings, subprocess.DEVNULL, attached=True)
    with _ended(guard):
        yield _started(guard, report)


def down() -> bool:
    """Stops the stack of this machine, even one that is starting, or whose owner was killed. False if there is none.

    Raises:
        StackError: what describes it is damaged.
    """
    owner = claim.current()
    if owner is None:
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
    """Starts or stops workers until there are `workers`.

    Raises:
        StackError: Ray does not answer, or a worker did not start.
    """
    ray_environment(running.directory)
    import ray

    from services.cluster.launcher import Launcher

    try:
        ray.init(address=running.ray_address, namespace="qaq", log_to_driver=False, logging_level="error")
    except Exception as error:
        raise StackError(f"Ray at {running.ray_address} does not answer ({error}); try `qaq down`") from error
    try:
        Launcher(running.settings, running.access, report).scale(workers)
    finally:
        ray.shutdown()
    state.save(running.model_copy(update={"settings": running.settings.model_copy(update={"workers": workers})}))


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
            return StackState.model_validate(event["ready"])
        if "failed" in event:
            raise StackError(event["failed"])
        report(*event["report"])
    code = guard.wait()
    if code == 0:
        raise StackError("the stack was stopped while it started")
    raise StackError(f"the stack's process ended with code {code}; see {state.directory() / 'stack.log'}")


def _tell(guard: subprocess.Popen[str], line: str) -> None:
    assert guard.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its end is noticed where its events are read
        guard.stdin.write(line + "\n")
        guard.stdin.flush()


@contextlib.contextmanager
def _ended(guard: subprocess.Popen[str], *, unless_received: bool = False) -> Iterator[None]:
    """Ends the stack with the block, or only if the block fails. SIGTERM and SIGHUP end the block as Ctrl-C does.

    The guard ends its stack alone, so a second signal only ends the waiting for it.
    """
    received = False
    try:
        with _signals_raise():
            yield
        received = unless_received
    finally:
        if not received:
            with contextlib.suppress(ProcessLookupError):
                guard.terminate()
            try:
                guard.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                guard.kill()
                guard.wait()


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
