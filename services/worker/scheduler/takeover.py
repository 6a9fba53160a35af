"""Takeover: a generation goes on for another call, when another router has taken its session.

A router that hangs, or is cut off, leaves its generations running; those of one that is known to be gone wait for some
seconds (orphans.py). The client is with another router by then, and asks for the rest of the turn: it gets the tokens
that it has missed at once, and nothing is computed twice.
"""

from __future__ import annotations

import grpc

from services.common import metrics
from services.common.errors import StatusError
from services.worker.generation import Generation
from services.worker.replies import Replies
from services.worker.scheduler.queue import RequestQueue
from services.worker.scheduler.step import RunningBatch
from services.worker.session_cache import session_name


class Takeover:
    """Looks for waiting calls to sessions that are active. Used by the scheduler's thread alone."""

    def __init__(self, queue: RequestQueue, batch: RunningBatch, replies: Replies) -> None:
        self._queue, self._batch, self._replies = queue, batch, replies

    def step(self) -> None:
        """Hands active generations to the waiting calls whose hold on the session is not an earlier one."""
        if not len(self._queue):
            return
        for waiting in self._queue.of_sessions(self._batch.busy_sessions):
            active = [g for g in self._batch.active if session_name(g.request) == session_name(waiting.request)]
            if not active:
                continue
            if all(0 < generation.request.fence <= waiting.request.fence for generation in active):
                self._take(waiting, active)
            elif 0 < waiting.request.fence < active[0].request.fence:
                self._queue.remove(waiting)
                self._replies.put(waiting, _taken(waiting))

    def _take(self, waiting: Generation, active: list[Generation]) -> None:
        first = active[0]
        if not first.serves(waiting):  # another turn: it begins when the session is free
            for generation in active:
                self._batch.fail(generation, _taken(generation))
            return
        self._queue.remove(waiting)
        self._replies.tell(first.call, _taken(first))
        self._queue.cancel(first.call)  # it has no generation any more
        self._replies.extend(waiting, first.hand_over(waiting))
        metrics.taken_over.inc()


def _taken(generation: Generation) -> StatusError:
    message = f'session "{generation.request.session_id}" is generating for another call, which has taken it'
    return StatusError(message, code=grpc.StatusCode.ABORTED)
