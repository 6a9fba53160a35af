"""Orphans: generations whose call broke off. They wait for the call of another router, see scheduler/takeover.py.

A router that is killed or hangs does not say so, and its client asks another one for the rest of the turn within
seconds. A router whose client has gone away says that nobody will.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import structlog
from qaq.v1 import worker_pb2

from services.common import metrics
from services.common.errors import StatusError
from services.worker.call import Call
from services.worker.scheduler.scheduler import Scheduler
from services.worker.session_cache import Name, session_name

UNWANTED_S = 60.0
"""How long a cancelled fence is known: a call may come after it that was sent before."""

log = structlog.get_logger()


@dataclass(eq=False)
class _Run:
    name: Name
    fence: int
    call: Call


class Orphans:
    """Knows the calls that run and those that broke off. Used by the event loop alone.

    Args:
        seconds: how long an orphan waits; with 0 there are none.
    """

    def __init__(self, scheduler: Scheduler, seconds: float) -> None:
        self._scheduler, self._seconds = scheduler, seconds
        self._runs: list[_Run] = []
        self._unwanted: dict[Name, int] = {}

    def check(self, request: worker_pb2.RunRequest) -> None:
        """Raises StatusError if nobody wants the generation any more, before its call came or while it was prepared."""
        if 0 < request.fence <= self._unwanted.get(session_name(request), 0):
            raise StatusError("the generation was cancelled before it began", code=grpc.StatusCode.ABORTED)

    @contextlib.contextmanager
    def kept(self, request: worker_pb2.RunRequest, call: Call) -> Iterator[None]:
        """Ends the generation with the context, or later if the call breaks off and may be followed by another."""
        run, loop = _Run(session_name(request), request.fence, call), asyncio.get_running_loop()
        self._runs.append(run)
        broken = False
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            broken = True
            raise
        finally:
            if broken and self._seconds and run in self._runs and _may_follow(request):
                self._scheduler.leave(call)
                loop.call_later(self._seconds, self._lapse, run)
            else:
                self._end(run)

    def cancel(self, name: Name, fence: int) -> None:
        """Ends a session's generations with this fence or an earlier one, whether their calls have broken off yet, are
        about to, or have not come."""
        self._unwanted[name] = max(fence, self._unwanted.get(name, 0))
        asyncio.get_running_loop().call_later(UNWANTED_S, self._forget, name, fence)
        for run in [run for run in self._runs if run.name == name and run.fence <= fence]:
            self._end(run)

    def _forget(self, name: Name, fence: int) -> None:
        if self._unwanted.get(name) == fence:  # else a later one was cancelled meanwhile
            del self._unwanted[name]

    def _lapse(self, run: _Run) -> None:
        if run in self._runs and not run.call.cancelled:  # else its generation has ended, or goes on for another call
            log.warning("a router is lost, and nobody asks for the rest of a generation", session=run.name[1])
            metrics.orphans_lapsed.inc()
        self._end(run)

    def _end(self, run: _Run) -> None:
        if run in self._runs:
            self._runs.remove(run)
        self._scheduler.cancel(run.call)


def _may_follow(request: worker_pb2.RunRequest) -> bool:
    """Whether another call can take the generation over."""
    return bool(request.session_id and request.fence) and request.choices <= 1
