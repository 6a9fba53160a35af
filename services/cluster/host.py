"""The process that owns a stack: `python -m services.cluster.host`, started by `control`.

It reads its settings from standard input and writes events to standard output, both as JSON lines. An attached
process also ends when its standard input closes, so nothing is left running when its parent is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from types import FrameType

from qaq_core.base.errors import QAQError
from services.cluster import state
from services.cluster.stack import LocalStack
from services.cluster.state import StackSettings

POLL_S = 0.2


class Stop(BaseException):
    """A signal asked the process to end."""


class Host:
    """Owns one stack and reports to the process that started it.

    A signal handler only sets a flag, which is read between steps: an exception raised in the middle of Ray's start
    may be lost in its code.
    """

    def __init__(self) -> None:
        request = json.loads(sys.stdin.readline())
        self._attached: bool = request["attached"]
        self._settings = StackSettings.model_validate(request["settings"])
        self._events = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # other output must not mix with the events
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is handled by the parent

    def run(self) -> int:
        """Runs the stack until a signal or the end of input. Returns the exit code."""
        if self._attached:
            threading.Thread(target=self._stop_with_input, daemon=True).start()
        stack = LocalStack(self._settings, self._report, None if self._attached else state.directory())
        try:
            started = stack.start()
            if not self._attached:
                state.save(started)
            self._send(ready=json.loads(started.model_dump_json()))
            self._events.close()
            while not self._stopping:
                time.sleep(POLL_S)
        except Stop:
            pass
        except QAQError as error:
            self._send(failed=str(error))
            return 1
        finally:
            stack.stop()
            if not self._attached:
                _forget_own_state()
        return 0

    def _report(self, name: str, stage: str, done: float | None) -> None:
        if self._stopping:
            raise Stop
        self._send(report=(name, stage, done))

    def _send(self, **event: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent has gone away
            self._events.write(json.dumps(event) + "\n")
            self._events.flush()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _stop_with_input(self) -> None:
        sys.stdin.read()
        self._stopping = True


def _forget_own_state() -> None:
    with contextlib.suppress(QAQError):
        saved = state.load()
        if saved is not None and saved.pid == os.getpid():
            state.forget()


if __name__ == "__main__":
    sys.exit(Host().run())
