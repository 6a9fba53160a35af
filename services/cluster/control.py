"""Control of a stack from other processes: start, scale, stop."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil

from services.cluster import state
from services.cluster.stack import python_path, ray_environment
from services.cluster.state import StackError, StackSettings, StackState
from services.common.embedded_redis import EmbeddedRedis
from services.common.extras import require

STOP_TIMEOUT_S = 60.0

Report = Callable[[str, str, float | None], None]


def up(settings: StackSettings, report: Report) -> StackState:
    """Starts a stack that outlives this process.

    Raises:
        StackError: a stack is running already, or this one did not start; nothing is left running.
    """
    running = state.load()
    if running is not None and running.alive:
        raise StackError(f"a stack is running already (router at {running.router}); stop it with `qaq down`")
    if running is not None:
        down(running)
    log = state.directory() / "stack.log"
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        return _start(_spawn(settings, file.fileno(), attached=False), report)


@contextlib.contextmanager
def attached(settings: StackSettings, report: Report) -> Iterator[StackState]:
    """A stack for the duration of a `with` block. It also stops if this process is killed.

    Raises:
        StackError: the stack did not start; nothing is left running.
    """
    owner = _spawn(settings, subprocess.DEVNULL, attached=True)
    try:
        yield _start(owner, report)
    finally:
        _end(owner)


def down(running: StackState) -> None:
    """Stops a stack, even one whose owner process has died."""
    if running.alive:
        owner = psutil.Process(running.pid)
        owner.terminate()
        try:
            owner.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired:
            owner.kill()  # Ray's processes notice it and end by themselves
            owner.wait(STOP_TIMEOUT_S)
    EmbeddedRedis.attach(running.redis).stop()
    shutil.rmtree(running.ray_directory, ignore_errors=True)
    state.forget()


def scale(running: StackState, workers: int, report: Report) -> None:
    """Starts or stops workers until there are `workers`.

    Raises:
        StackError: Ray does not answer, or a worker did not start.
    """
    ray_environment(running.ray_directory)
    import ray

    from services.cluster.launcher import Launcher

    try:
        ray.init(address=running.ray_address, namespace="qaq", log_to_driver=False, logging_level="error")
    except Exception as error:
        raise StackError(f"Ray at {running.ray_address} does not answer ({error}); try `qaq down`") from error
    try:
        Launcher(running.settings, running.redis["url"], running.secret, report).scale(workers)
    finally:
        ray.shutdown()
    state.save(running.model_copy(update={"settings": running.settings.model_copy(update={"workers": workers})}))


def _spawn(settings: StackSettings, errors: int, *, attached: bool) -> subprocess.Popen[str]:
    require("ray")  # in this process, which can say what to install
    owner = subprocess.Popen(
        [sys.executable, "-m", "services.cluster.host"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=os.environ | {"PYTHONPATH": python_path()},
        text=True,
        start_new_session=True,
    )
    assert owner.stdin is not None
    owner.stdin.write(json.dumps({"settings": settings.model_dump(), "attached": attached}) + "\n")
    owner.stdin.flush()
    return owner


def _start(owner: subprocess.Popen[str], report: Report) -> StackState:
    """Reads the events of the owner process until the stack is ready."""
    assert owner.stdout is not None
    try:
        for line in owner.stdout:
            event = json.loads(line)
            if "ready" in event:
                return StackState.model_validate(event["ready"])
            if "failed" in event:
                raise StackError(event["failed"])
            report(*event["report"])
    except BaseException:
        _end(owner)
        raise
    code = owner.wait()
    raise StackError(f"the stack's process ended with code {code}; see {state.directory() / 'stack.log'}")


def _end(owner: subprocess.Popen[str]) -> None:
    if owner.poll() is None:
        owner.terminate()
    try:
        owner.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        owner.kill()
        owner.wait()
