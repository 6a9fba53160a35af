"""Stored pages on their way into a prompt: asked for in the background, while others are computed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import structlog

from qaq_core import Originals, Page, PageShape
from qaq_core.base.errors import OriginalsError
from services.common import metrics
from services.common.log import once

PAGES_A_CALL = 16
CALLS_IN_FLIGHT = 2

log = structlog.get_logger()


class PrefixLoad:
    """The longest stored prefix of a prompt. `poll` it until it is over, then `take` what came, or `close` it.

    A store that fails, lacks a page or is too slow ends the prefix where it is; the rest is computed.

    Args:
        shared: names that follow from the prompt's tokens, of as many pages as may be loaded.
        known: names that a session's first pages were stored under, where they are known. They go before `shared`,
            unless they are a part of it.
        patience_s: seconds that all of it may take, from the first look on.
    """

    def __init__(
        self,
        originals: Originals,
        shape: PageShape,
        shared: Sequence[bytes],
        known: Sequence[bytes],
        patience_s: float,
    ) -> None:
        self._originals, self._shape, self._shared = originals, shape, shared
        known = known[: len(shared)]
        self._names = list(shared if list(known) == list(shared[: len(known)]) else known)
        self._pages: list[Page] = []
        self._calls: deque[tuple[list[bytes], Future[list[Page | None]]]] = deque()
        self._asked = 0
        self._patience_s = patience_s
        self._ends: float | None = None
        self._match: Future[int] | None = None

    def poll(self) -> bool:
        """Asks, and moves on as far as answers have come; True when no more is to be expected."""
        if self._ends is None:
            self._ends = time.monotonic() + self._patience_s
            self._match = self._originals.match(self._names)
        try:
            while True:
                if self._match is not None:
                    if not self._match.done():
                        break
                    del self._names[self._match.result() :]
                    self._match = None
                while self._asked < len(self._names) and len(self._calls) < CALLS_IN_FLIGHT:
                    names = self._names[self._asked : self._asked + PAGES_A_CALL]
                    self._calls.append((names, self._originals.fetch(names, self._shape)))
                    self._asked += len(names)
                if not self._calls:
                    return True
                if not self._calls[0][1].done():
                    break
                self._arrived(*self._calls.popleft())
        except OriginalsError as error:
            self._give_up(str(error))
            return True
        if time.monotonic() < self._ends:
            return False
        self._give_up("it took too long")
        return True

    def take(self) -> tuple[list[Page], int]:
        """The pages, from the first without a gap, and how many of them have names that follow from the tokens."""
        pages, self._pages = self._pages, []
        pairs = zip(pages, self._shared, strict=False)
        return pages, next((i for i, (page, name) in enumerate(pairs) if page.id != name), len(pages))

    def close(self) -> None:
        """Lets go of everything."""
        if self._match is not None:
            self._match.cancel()
        for names, call in self._calls:
            if not call.cancel():
                call.add_done_callback(lambda done, names=names: self._forget(names, done))  # type: ignore[misc]
        self._calls.clear()
        self._originals.forget([page.id for page in self._pages])
        self._pages = []

    def _arrived(self, names: list[bytes], call: Future[list[Page | None]]) -> None:
        answer = call.result()
        found = answer.index(None) if None in answer else len(answer)
        self._pages += [page for page in answer[:found] if page is not None]
        if found < len(answer):  # a page was lost since it was matched
            self._originals.forget([page.id for page in answer[found:] if page is not None])
            del self._names[len(self._pages) :]
            self._give_up("a page was lost")

    def _give_up(self, reason: str) -> None:
        metrics.prefix_failures.inc()
        if once("prefix"):
            log.warning("a stored prefix could not be loaded whole; the rest is computed", reason=reason)
        self._drop_calls()

    def _drop_calls(self) -> None:
        pages, self._pages = self._pages, []
        self.close()
        self._pages = pages

    def _forget(self, names: list[bytes], call: Future[list[Page | None]]) -> None:
        """An answer that nobody waits for any more."""
        if not call.cancelled() and call.exception() is None:
            self._originals.forget([page.id for page in call.result() if page is not None])
