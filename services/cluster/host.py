"""The process that owns a stack: `python -m services.cluster.host`, started by `control`.

Reads its settings from standard input and writes events to standard output, both as JSON lines. Attached,
it also ends when its standard input does, so that a starter that was killed leaves nothing running.
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
    """The process was asked to end."""


class Host:
    """One stack and its starter.

    A signal only leaves a note, which is read between steps: raised in the middle of Ray's start, an
    exception may get lost in foreign code.
    """

    def __init__(self) -> None:
        asked = json.loads(sys.stdin.readline())
        self._attached: bool = asked["attached"]
        self._settings = StackSettings.model_validate(asked["settings"])
        self._events = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else prints must not mix with the events
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's: the starter decides what it means

    def run(self) -> int:
        """Runs the stack until it is told to stop. Returns the exit code."""
        if self._attached:
            threading.Thread(target=self._end_with_input, daemon=True).start()
        stack = LocalStack(self._settings, self._report)
        try:
            started = stack.start()
            if not self._attached:
                state.save(started)
            self._tell(ready=json.loads(started.model_dump_json()))
            self._events.close()
            while not self._stopping:
                time.sleep(POLL_S)
        except Stop:
            pass
        except QAQError as error:
            self._tell(failed=str(error))
            return 1
        finally:
            stack.stop()
            if not self._attached:
                _forget_mine()
        return 0

    def _report(self, who: str, what: str, done: float | None) -> None:
        if self._stopping:
            raise Stop
        self._tell(report=(who, what, done))

    def _tell(self, **event: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more
            self._events.write(json.dumps(event) + "\n")
            self._events.flush()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _end_with_input(self) -> None:
        sys.stdin.read()
        self._stopping = True


def _forget_mine() -> None:
    with contextlib.suppress(QAQError):
        saved = state.load()
        if saved is not None and saved.pid == os.getpid():
            state.forget()


if __name__ == "__main__":
    sys.exit(Host().run())
