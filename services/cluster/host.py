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
from types import FrameType
from typing import Any

from qaq_core.errors import QAQError
from services.cluster import state
from services.cluster.stack import LocalStack
from services.cluster.state import StackSettings


class Stop(BaseException):
    """The process was asked to end."""


def main() -> int:
    """Runs a stack until it is told to stop. Returns the exit code."""
    asked = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's: the starter decides what it means
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not mix with the events
    stack = LocalStack(StackSettings.model_validate(asked["settings"]), lambda *event: _tell(events, report=event))
    try:
        if asked["attached"]:
            threading.Thread(target=_end_with_input, daemon=True).start()
        started = stack.start()
        if not asked["attached"]:
            state.save(started)
        _tell(events, ready=json.loads(started.model_dump_json()))
        events.close()
        while True:
            signal.pause()
    except Stop:
        return 0
    except QAQError as error:
        _tell(events, failed=str(error))
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stack.stop()
        if not asked["attached"]:
            _forget_mine()


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stop


def _end_with_input() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _forget_mine() -> None:
    with contextlib.suppress(QAQError):
        saved = state.load()
        if saved is not None and saved.pid == os.getpid():
            state.forget()


def _tell(events: Any, **event: object) -> None:
    with contextlib.suppress(BrokenPipeError, ValueError):  # nobody listens any more
        events.write(json.dumps(event) + "\n")
        events.flush()


if __name__ == "__main__":
    sys.exit(main())
