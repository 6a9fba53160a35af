"""Which worker runs a generation. A policy narrows the choice; the first that decides wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from services.router.sessions import Session


class Candidate(Protocol):
    """What policies may know of a worker.

    Attributes:
        load: generations that run or wait there. kv_bytes: held by its caches.
    """

    @property
    def address(self) -> str: ...

    @property
    def load(self) -> int: ...

    @property
    def kv_bytes(self) -> int: ...


C = TypeVar("C", bound=Candidate)


class Policy(Protocol):
    """One reason to prefer a worker."""

    def choose(self, session: Session, workers: Sequence[C]) -> C | None:
        """A worker out of a non-empty list, or None for no opinion."""
        ...


class SessionAffinity:
    """The worker that already holds the session's cache."""

    def choose(self, session: Session, workers: Sequence[C]) -> C | None:
        return next((worker for worker in workers if worker.address == session.worker), None)


class LeastLoaded:
    """The fewest generations, then the fewest cache bytes, then by address."""

    def choose(self, session: Session, workers: Sequence[C]) -> C | None:
        return min(workers, key=lambda worker: (worker.load, worker.kv_bytes, worker.address))


POLICIES: tuple[Policy, ...] = (SessionAffinity(), LeastLoaded())


def place(session: Session, workers: Sequence[C], policies: Sequence[Policy] = POLICIES) -> C | None:
    """The worker for a session's next generation; None if there are none."""
    if not workers:
        return None
    choices = (policy.choose(session, workers) for policy in policies)
    return next((choice for choice in choices if choice is not None), None)
