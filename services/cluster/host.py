"""The process that runs a stack: `python -m services.cluster.host`, started by the guard.

It reads its request from standard input and writes events to standard output, both as JSON lines. When its standard
input closes, the guard was killed, and this process ends the stack.
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
from typing import NoReturn

from qaq_core.base.errors import QAQError
from services.cluster import remains, state
from services.cluster.foundation import FoundationError
from services.cluster.pipes import Events, lines
from services.cluster.stack import LocalStack
from services.cluster.state import Owner, StackError, StackSettings

POLL_S = 0.2


class Host:
    """Runs one stack and reports to the process that asked for it."""

    def __init__(self) -> None:
        self._inputs = lines(0)
        request = json.loads(next(self._inputs))
        self._attached: bool = request["attached"]
        self._settings = StackSettings.model_validate(request["settings"])
        self._owner = Owner.model_validate(request["owner"])
        self._events = Events()
        self._ready = self._stopping = self._orphaned = False

    def run(self) -> int:
        """Runs the stack until SIGTERM or the death of the guard. Returns the exit code."""
        threading.Thread(target=self._watch, daemon=True).start()
        stack = LocalStack(self._settings, self._owner, self._report, None if self._attached else state.directory())
        try:
            started = stack.start()
            # Now, because Ray sets handlers of its own. Before, a signal ends this process, and the guard the stack.
            signal.signal(signal.SIGTERM, self._stop)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if not self._attached:
                state.save(started)
            self._ready = True
            self._events.send(ready=json.loads(started.model_dump_json()))
            while not self._stopping:
                stack.check()
                time.sleep(POLL_S)
        except FoundationError as error:
            self._end(str(error))
        except QAQError as error:
            self._events.send(failed=str(error))
            return 1
        finally:
            stack.stop()
            if self._orphaned:
                self._clear()
        return 0

    def _end(self, why: str) -> NoReturn:
        """Says why the stack ends, and leaves its servers to the guard: nothing that Ray is asked is answered."""
        print(why, file=sys.stderr, flush=True)
        if not self._attached:
            with contextlib.suppress(StackError):
                state.say_why(why)
        self._events.send(ended=why)
        if self._orphaned:
            self._clear()
        os._exit(1)

    def _report(self, name: str, stage: str, done: float | None) -> None:
        self._events.send(report=(name, stage, done))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _watch(self) -> None:
        """Waits for the death of the guard. Before the stack is ready, nothing in it is worth a slow end."""
        for _ in self._inputs:
            pass
        self._orphaned = self._stopping = True
        if not self._ready:
            self._clear()
            os._exit(1)

    def _clear(self) -> None:
        remains.clear(self._owner.directory, descendants=True)


if __name__ == "__main__":
    sys.exit(Host().run())
