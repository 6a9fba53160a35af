"""The worker that holds the session's cache."""

from __future__ import annotations

from collections.abc import Sequence

from services.router.placement.base import C, Policy, spare
from services.router.sessions import Session

SLACK = 8
"""So many generations more than elsewhere are worth waiting for, rather than loading the cache there."""


class SessionAffinity(Policy):
    """Sticky, but not at any price: a session can be loaded from its pages on any worker."""

    def choose(self, session: Session, prompt: Sequence[int], workers: Sequence[C]) -> C | None:
        holder = next((worker for worker in workers if worker.address == session.worker), None)
        return holder if holder is not None and spare(holder, workers, SLACK) else None
