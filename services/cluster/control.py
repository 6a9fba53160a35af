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
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from services.cluster import claim, roles, state
from services.cluster.remains import MARK
from services.cluster.stack import python_path, ray_environment
from services.cluster.state import StackError, StackSettings, StackState
from services.common.extras import require
from services.common.identity import is_loopback

if TYPE_CHECKING:
    from services.cluster.survey import Survey

STOP_TIMEOUT_S = 60.0

STACK = "stack"

Report = Callable[[str, str, float | None], None]


def up(settings: StackSettings, report: Report) -> StackState:
    """Starts a stack that outlives this process.

    Raises:
        StackError: a stack is running already, or this one did not start; nothing is left running.
        ValidationError, QAQError, ModuleNotFoundError: a setting or the machine is not fit; nothing was started.
    """
    refuse_a_second()
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


def refuse_a_second() -> None:
    """Raises:
    StackError: the state directory has a stack already.
    """
    owner, deployed = claim.current(), state.load()
    if owner is not None and owner.alive:
        raise claim.taken(owner)
    if deployed is not None and deployed.address is not None:
        raise StackError(
            f"a stack was started on the Ray cluster at {deployed.address}; stop it with `qaq down`, or set "
            "QAQ_STATE_DIR to another directory for a second one"
        )


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


def scale(where: StackState | str, workers: int, report: Report, model: str = "", most: int | None = None) -> None:
    """Starts or stops workers until there are `workers` that serve, or as many up to `most` as the load asks for.

    Args:
        where: the stack of this machine, or the address of the Ray cluster on which one runs; so for all below.
        model: of the workers; empty: the first one.
    Raises:
        StackError: Ray does not answer, the stack has no such model, or a worker did not start.
    """
    _changed(where, "scale", workers, model, most, report=report)


def add(where: StackState | str, model: str, workers: int, changes: Mapping[str, Any], report: Report) -> str:
    """Starts workers of another model. Returns its name.

    Args:
        changes: see `Launcher.add`.
    Raises:
        StackError: Ray does not answer, or the model cannot be served; nothing of it is left.
        ModelLoadError: its files are not on this machine, and the stack is.
    """
    if isinstance(where, StackState) and where.address is None:
        roles.check_files(model)
    return str(_changed(where, "add", model, workers, changes, report=report))


def remove(where: StackState | str, model: str, patience_s: float, report: Report) -> bool:
    """Stops the workers of a model when its streams have ended. False if some had not after `patience_s`.

    Raises:
        StackError: Ray does not answer, or the stack has no such model, or no other.
    """
    return bool(_changed(where, "remove", model, patience_s, report=report))


def drain(where: StackState | str, target: str, report: Report) -> int:
    """Stops a worker, or those of a node, when it has handed over what it runs. The number of workers stays.

    Args:
        target: see `Launcher.drain`.
    Returns:
        the number of generations that moved.
    Raises:
        StackError: Ray does not answer, nothing of the stack is there, or none could be started in its place.
    """
    return int(_changed(where, "drain", target, report=report))


def restart(where: StackState | str, report: Report) -> int:
    """Replaces all workers, one after the other. Returns the number of generations that moved.

    Raises:
        StackError: Ray does not answer, or a worker did not start.
    """
    return int(_changed(where, "restart", report=report))


def survey(where: StackState | str) -> Survey:
    """What runs where, of a stack on a Ray cluster.

    Raises:
        StackError: Ray or the stack's controller does not answer.
    """
    address = reach(where)
    from services.cluster import controller

    with controller.connected(address):
        found: Survey = controller.answer(controller.find().survey.remote(), controller.ANSWER_S)
        return found


def scaled(where: StackState | str) -> dict[str, str]:
    """By model whose number of workers follows its load: within which bounds, and what was changed last.

    Raises:
        StackError: Ray or the stack's controller does not answer.
    """
    address = reach(where)
    from services.cluster import controller

    with controller.connected(address):
        found: dict[str, str] = controller.answer(controller.find().scaled.remote(), controller.ANSWER_S)
        return found


def _changed(where: StackState | str, method: str, *arguments: Any, report: Report) -> Any:
    """The answer of the controller. It changes a stack once at a time: others wait there."""
    address = reach(where)
    from services.cluster import controller

    with controller.connected(address):
        return controller.call(controller.find(), method, *arguments, report=report)


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


def reach(where: StackState | str) -> str:
    """The address of a stack's Ray; sets the environment for calls to it. Call it before Ray is imported."""
    if isinstance(where, StackState) and where.address is None:
        ray_environment(where.directory)
        return where.ray_address
    address = where if isinstance(where, str) else where.ray_address
    host = urlsplit(address if "://" in address else f"ray://{address}").hostname or ""
    if is_loopback(host):  # Ray would replace it by an address of this machine that others can reach
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    return address
