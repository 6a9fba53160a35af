"""The workers of one model of a stack: how they compute, how many are wanted, and how they are named.

A worker's name says whose it is, so Ray's table of named actors says which models there are: `worker-0` is of the
model that the stack was started with, or the first of several, and `worker-NAME-0` of another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qaq_core.models import name_of
from services.cluster.state import ServedModel

_WORKER = re.compile(r"worker-(?:(?P<key>.+)-)?(?P<index>\d+)")
_STRANGE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass
class Fleet:
    """The workers of a model.

    Attributes:
        served: with the number of workers that is wanted now.
        key: the part of their names that says whose they are; empty for the first model.
        least: the fewest workers; if it is not given, as many as are wanted now.
    """

    served: ServedModel
    key: str = ""
    least: int = 0

    def __post_init__(self) -> None:
        self.least = self.least or self.served.workers

    @property
    def most(self) -> int:
        """The most workers."""
        return max(self.least, self.served.max_workers or 0)

    def want(self, workers: int) -> None:
        """Says how many workers are wanted from now on."""
        self.served = self.served.model_copy(update={"workers": workers})

    @classmethod
    def another(cls, served: ServedModel) -> Fleet:
        """That of a model which is not the first."""
        return cls(served, key_of(name_of(served.model)))

    @property
    def name(self) -> str:
        """Of the model, as requests name it."""
        return name_of(self.served.model)

    @property
    def gpus(self) -> int:
        """That each worker reserves."""
        return 1 if self.served.device.startswith("cuda") else 0

    def worker(self, index: int) -> str:
        """The name of a worker."""
        return f"worker-{self.key}-{index}" if self.key else f"worker-{index}"

    def mine(self, names: Iterable[str]) -> list[str]:
        """Those that are names of its workers."""
        return [name for name in names if of_worker(name) == self.key]

    def free(self, names: Iterable[str], count: int) -> list[str]:
        """Names for so many more workers, beside those that there are."""
        taken = set(names)
        candidates = (self.worker(index) for index in range(len(taken) + count))
        return [name for name in candidates if name not in taken][:count]


def key_of(name: str) -> str:
    """A model's name as a part of workers' names."""
    return _STRANGE.sub("-", name)


def of_worker(name: str) -> str | None:
    """The key of the fleet of a server's name; None of one that is no worker."""
    found = _WORKER.fullmatch(name)
    return None if found is None else found["key"] or ""
