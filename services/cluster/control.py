"""What other processes do with a stack: start it, find it, scale it, stop it."""

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
    """Starts a stack that goes on when this process ends.

    Raises:
        StackError: one runs already, or it did not start; nothing is left running.
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
    """A stack for the length of a `with`, whatever ends it; also if this process is killed.

    Raises:
        StackError: it did not start; nothing is left running.
    """
    host = _spawn(settings, subprocess.DEVNULL, attached=True)
    try:
        yield _start(host, report)
    finally:
        _end(host)


def down(running: StackState) -> None:
    """Stops a stack, also one whose owner has died."""
    if running.alive:
        owner = psutil.Process(running.pid)
        owner.terminate()
        try:
            owner.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired:
            owner.kill()  # Ray's processes notice and end by themselves
            owner.wait(STOP_TIMEOUT_S)
    EmbeddedRedis.attach(running.redis).stop()
    shutil.rmtree(running.ray_directory, ignore_errors=True)
    state.forget()


def scale(running: StackState, workers: int, report: Report) -> None:
    """Starts or stops workers until there are that many.

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
        Launcher(running.settings, running.redis["url"], report).scale(workers)
    finally:
        ray.shutdown()
    state.save(running.model_copy(update={"settings": running.settings.model_copy(update={"workers": workers})}))


def _spawn(settings: StackSettings, errors: int, *, attached: bool) -> subprocess.Popen[str]:
    require("ray")  # in this process, which can say what to install
    host = subprocess.Popen(
        [sys.executable, "-m", "services.cluster.host"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=os.environ | {"PYTHONPATH": python_path()},
        text=True,
        start_new_session=True,
    )
    assert host.stdin is not None
    host.stdin.write(json.dumps({"settings": settings.model_dump(), "attached": attached}) + "\n")
    host.stdin.flush()
    return host


def _start(host: subprocess.Popen[str], report: Report) -> StackState:
    """Follows a host until its stack is ready."""
    assert host.stdout is not None
    try:
        for line in host.stdout:
            event = json.loads(line)
            if "ready" in event:
                return StackState.model_validate(event["ready"])
            if "failed" in event:
                raise StackError(event["failed"])
            report(*event["report"])
    except BaseException:
        _end(host)
        raise
    code = host.wait()
    raise StackError(f"the stack's process ended with code {code}; look at {state.directory() / 'stack.log'}")


def _end(host: subprocess.Popen[str]) -> None:
    if host.poll() is None:
        host.terminate()
    try:
        host.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        host.kill()
        host.wait()
