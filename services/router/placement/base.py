"""What a placement policy is, and what it may know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, TypeVar

from services.router.sessions import Session


class Candidate(Protocol):
    """A worker.

    Attributes:
        load: generations that run or wait there.
        kv_bytes: held by its caches. pressure: the share of its budget that this is; 0 if it has none.
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
    """One reason to prefer a worker."""

    @abstractmethod
    def choose(self, session: Session, prompt: Sequence[int], workers: Sequence[C]) -> C | None:
        """A worker out of a non-empty list, or None for no opinion. `prompt` is the whole log."""

    def placed(self, session: Session, prompt: Sequence[int], address: str) -> None:  # noqa: B027 (few remember)
        """A generation was given to that worker, whoever chose it."""


def spare(worker: Candidate, workers: Sequence[Candidate], slack: int) -> bool:
    """Whether a worker has at most `slack` generations more than the least busy one."""
    return worker.load <= min(other.load for other in workers) + slack
