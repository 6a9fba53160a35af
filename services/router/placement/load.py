"""The least loaded worker."""

from __future__ import annotations

from collections.abc import Sequence

from services.router.placement.base import C, Policy
from services.router.session import Session


class LeastLoaded(Policy):
    """Chooses by the number of generations, then by cache bytes, then by address."""

    def choose(self, session: Session, prompt: Sequence[int], workers: Sequence[C]) -> C:
        return min(workers, key=lambda worker: (worker.load, worker.kv_bytes, worker.address))
