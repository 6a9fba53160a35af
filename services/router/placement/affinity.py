"""Session affinity: the worker that has the session's cache."""

from __future__ import annotations

from collections.abc import Sequence

from services.router.placement.base import C, Policy, spare
from services.router.session import Session

SLACK = 8
"""With more generations than this above the least loaded worker, loading the cache on another worker is faster."""


class SessionAffinity(Policy):
    """Chooses the session's worker, unless it is overloaded: any worker can load the session from its pages."""

    def choose(self, session: Session, prompt: Sequence[int], workers: Sequence[C]) -> C | None:
        holder = next((worker for worker in workers if worker.address == session.worker), None)
        return holder if holder is not None and spare(holder, workers, SLACK) else None
