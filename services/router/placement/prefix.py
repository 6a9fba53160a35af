"""Prefix locality: the worker that recently got a prompt with the same first tokens.

Every worker can load a prefix that is stored. A prefix that a worker is still computing can only be reused by a prompt
that waits in the queue of the same worker.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from services.router.placement.base import C, Policy, spare
from services.router.session import Session

TOKENS = 64
REMEMBERED = 4096
SLACK = 1
"""With more generations than this above the least loaded worker, a prompt with the same prefix goes elsewhere."""


class PrefixLocality(Policy):
    """Remembers the workers of recent prompts by their tenant and their first `TOKENS` tokens.

    Where a tenant's prompt goes tells nothing of what other tenants sent.
    """

    def __init__(self) -> None:
        self._workers: OrderedDict[tuple[str, tuple[int, ...]], str] = OrderedDict()

    def choose(self, session: Session, prompt: Sequence[int], workers: Sequence[C]) -> C | None:
        address = self._workers.get((session.tenant, tuple(prompt[:TOKENS])))
        known = next((worker for worker in workers if worker.address == address), None)
        return known if known is not None and spare(known, workers, SLACK) else None

    def placed(self, session: Session, prompt: Sequence[int], address: str) -> None:
        if len(prompt) < TOKENS:
            return
        beginning = session.tenant, tuple(prompt[:TOKENS])
        self._workers[beginning] = address
        self._workers.move_to_end(beginning)
        if len(self._workers) > REMEMBERED:
            self._workers.popitem(last=False)
