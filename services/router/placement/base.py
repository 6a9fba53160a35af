"""The interface of a placement policy, and what it knows of a worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, TypeVar

from services.router.session import Session


class Candidate(Protocol):
    """A worker.

    Attributes:
        load: generations that run or wait on it.
        kv_bytes: bytes of its caches.
        memory_use: kv_bytes over the worker's budget; 0 without a budget.
    """

    @property
    def address(self) -> str: ...

    @property
    def load(self) -> int: ...

    @property
    def kv_bytes(self) -> int: ...

    @property
    def memory_use(self) -> float: ...


C = TypeVar("C", bound=Candidate)


class Policy(ABC):
    """One criterion for a worker."""

    @abstractmethod
    def choose(self, session: Session, prompt: Sequence[int], workers: Sequence[C]) -> C | None:
        """A worker of a non-empty list, or None for no preference. `prompt` is the whole token log."""

    def placed(self, session: Session, prompt: Sequence[int], address: str) -> None:  # noqa: B027 (optional)
        """Called after a generation was placed on a worker, by any policy."""


def spare(worker: Candidate, workers: Sequence[Candidate], slack: int) -> bool:
    """Whether a worker has at most `slack` generations more than the least loaded one."""
    return worker.load <= min(other.load for other in workers) + slack
