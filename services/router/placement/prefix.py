"""The worker that lately began a text in the same way.

Every worker can load a stored prefix, so nothing is lost elsewhere; but a prompt whose beginning is being computed
right now finds it stored only if it waits in the same queue.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from services.router.placement.base import C, Policy, spare
from services.router.sessions import Session

TOKENS = 64
REMEMBERED = 4096
SLACK = 1
"""With more than so many generations above the least busy worker, a common beginning is left to others too."""


class PrefixLocality(Policy):
    """Remembers where the last prompts with the same first tokens went."""

    def __init__(self) -> None:
        self._places: OrderedDict[tuple[int, ...], str] = OrderedDict()

    def choose(self, session: Session, prompt: Sequence[int], workers: Sequence[C]) -> C | None:
        address = self._places.get(tuple(prompt[:TOKENS]))
        known = next((worker for worker in workers if worker.address == address), None)
        return known if known is not None and spare(known, workers, SLACK) else None

    def placed(self, session: Session, prompt: Sequence[int], address: str) -> None:
        if len(prompt) < TOKENS:
            return
        beginning = tuple(prompt[:TOKENS])
        self._places[beginning] = address
        self._places.move_to_end(beginning)
        if len(self._places) > REMEMBERED:
            self._places.popitem(last=False)
