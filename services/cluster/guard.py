"""The process that owns a stack: `python -m services.cluster.guard`, started by `control`.

It starts the host, which runs Redis and Ray, and ends whatever is left when the host has ended or is to end. So a stack
leaves nothing, however its start or its stop is interrupted. All that the host starts stays below this process, also
what its own parent has left (on Linux: a child subreaper). If this process is killed, the host ends everything.

Its standard input says how long the stack is wanted. The first line is the request. Another line says that the stack
that became ready was received; until then, the end of input ends it, and an attached stack ends so at any time. A stack
that was received gets time to let its streams end; another one is ended at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from qaq_core.base.errors import QAQError
from services.cluster import claim, remains, state
from services.cluster.pipes import Events, lines
from services.cluster.state import Owner, StackError

POLL_S = 0.2
GRACE_S = 40.0
FREE_BYTES = 64 << 20  # what Ray's and Redis's files take, and their logs in the beginning
_PR_SET_CHILD_SUBREAPER = 36


class Guard:
    """Owns one stack.

    Args:
        request: the settings, and whether the stack ends with the process that started it.
        inputs: further lines of standard input.
    """

    def __init__(self, request: dict[str, Any], inputs: Iterator[str], events: Events) -> None:
        self._settings = request["settings"]
        self._attached: bool = request["attached"]
        self._inputs, self._events = inputs, events
        self._received = self._asked = False

    def run(self) -> int:
        """Runs the stack until it ends or is to end. Returns the exit code.

        Raises:
            StackError: another stack runs, or there is no room for this one.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask)
        threading.Thread(target=self._listen, daemon=True).start()
        owner = Owner(pid=os.getpid(), born=psutil.Process().create_time(), directory=_free_name())
        claim.clear_abandoned(owner.directory.parent)
        with contextlib.ExitStack() as stack:
            if not self._attached:
                stack.enter_context(claim.claimed(owner))
            stack.callback(remains.clear, owner.directory, descendants=True)
            with _telling(owner.directory.parent):
                owner.directory.mkdir(0o700)
                stack.enter_context(claim.marked(owner))
            code = self._guard(self._start(owner))
            if code and self._received and not self._attached:
                _tell_end(code)
            return code

    def _start(self, owner: Owner) -> int:
        """Starts the host. Returns its process id. It notices the end of this process at its standard input."""
        host = subprocess.Popen(
            [sys.executable, "-m", "services.cluster.host"],
            stdin=subprocess.PIPE,
            stdout=self._events.descriptor,
            env=os.environ | {remains.MARK: str(owner.directory)},
            text=True,
        )
        self._events.close()
        self._host = host  # keeps its standard input open
        assert host.stdin is not None
        request = {"settings": self._settings, "owner": json.loads(owner.model_dump_json()), "attached": self._attached}
        with contextlib.suppress(BrokenPipeError):
            host.stdin.write(json.dumps(request) + "\n")
            host.stdin.flush()
        return host.pid

    def _guard(self, host: int) -> int:
        code = _ended(host, lambda: self._asked)
        if code is None and self._received:
            os.kill(host, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            code = _ended(host, lambda: time.monotonic() > deadline)
        return 0 if self._asked else code or 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _listen(self) -> None:
        for _ in self._inputs:
            self._received = True
        if self._attached or not self._received:
            self._asked = True


def _tell_end(code: int) -> None:
    """Says that the host has ended, unless it has said why itself."""
    with contextlib.suppress(StackError):
        if not state.why_it_ended():
            how = f"by signal {-code}" if code < 0 else f"with code {code}"
            state.say_why(f"the stack's process ended {how}; see {state.directory() / 'stack.log'}")


def _ended(host: int, given_up: Callable[[], bool]) -> int | None:
    """The host's exit code once it has ended; None if it was given up. Also reaps what others have left."""
    while not given_up():
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == host:
            return os.waitstatus_to_exitcode(status)
        if pid == 0:
            time.sleep(POLL_S)
    return None


def _free_name() -> Path:
    """The path of a directory that does not exist yet.

    Raises:
        StackError: there is no room for one.
    """
    with _telling(None):
        base = remains.base()
        free = shutil.disk_usage(base).free
    if free < FREE_BYTES:
        raise StackError(
            f"{base} has {free >> 20} MB free, and Redis and Ray need {FREE_BYTES >> 20} MB for their files; make room "
            "or set TMPDIR to a short path on another disk"
        )
    return base / f"{remains.PREFIX}{secrets.token_hex(4)}"


@contextlib.contextmanager
def _telling(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StackError(
            f"{folder or 'the temporary directory'} cannot be written ({error.strerror or error}); make room or set "
            "TMPDIR to a short path on another disk"
        ) from error


def _keep_descendants() -> None:
    """Processes whose parent dies become this one's children. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main() -> int:
    os.umask(0o077)
    inputs = lines(0)
    request = next(inputs, None)
    if request is None:  # the command was killed before it had asked
        return 0
    _keep_descendants()
    events = Events()
    try:
        return Guard(json.loads(request), inputs, events).run()
    except QAQError as error:
        events.send(failed=str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
