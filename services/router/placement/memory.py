"""The worker whose caches fill the smallest share of its budget."""

from __future__ import annotations

from collections.abc import Sequence

from services.router.placement.base import C, Policy
from services.router.session import Session


class LeastMemory(Policy):
    """Has no preference if no worker has a budget."""

    def choose(self, session: Session, prompt: Sequence[int], workers: Sequence[C]) -> C | None:
        least = min(workers, key=lambda worker: (worker.memory_use, worker.load, worker.address))
        return least if any(worker.memory_use for worker in workers) else None
