"""Loading of a stored prefix into a prompt, in the background while other sequences are computed."""

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

PAGES_PER_CALL = 16
CALLS_IN_FLIGHT = 2

log = structlog.get_logger()


class PrefixLoad:
    """The longest stored prefix of a prompt. Call `poll` until it returns True, then `take`; or `close` at any time.

    If the store fails, lacks a page, or takes too long, the prefix ends there and the rest is computed.

    Args:
        shared: content hashes of the prompt's pages, of as many pages as may be loaded.
        page_ids: ids under which a session's first pages were stored, if they are known. They are used instead of
            `shared`, unless they are a part of it.
        timeout_s: seconds that the load may take, from the first `poll`.
    """

    def __init__(
        self,
        originals: Originals,
        shape: PageShape,
        shared: Sequence[bytes],
        page_ids: Sequence[bytes],
        timeout_s: float,
    ) -> None:
        self._originals, self._shape, self._shared = originals, shape, shared
        page_ids = page_ids[: len(shared)]
        self._ids = list(shared if list(page_ids) == list(shared[: len(page_ids)]) else page_ids)
        self._pages: list[Page] = []
        self._calls: deque[Future[list[Page | None]]] = deque()
        self._requested = 0
        self._timeout_s = timeout_s
        self._deadline: float | None = None
        self._match: Future[int] | None = None

    def poll(self) -> bool:
        """Sends the next requests and takes in the replies that have arrived. True when the load has ended."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout_s
            self._match = self._originals.match(self._ids)
        try:
            while True:
                if self._match is not None:
                    if not self._match.done():
                        break
                    del self._ids[self._match.result() :]
                    self._match = None
                while self._requested < len(self._ids) and len(self._calls) < CALLS_IN_FLIGHT:
                    ids = self._ids[self._requested : self._requested + PAGES_PER_CALL]
                    self._calls.append(self._originals.fetch(ids, self._shape))
                    self._requested += len(ids)
                if not self._calls:
                    return True
                if not self._calls[0].done():
                    break
                self._take_in(self._calls.popleft().result())
        except OriginalsError as error:
            self._give_up(str(error))
            return True
        if time.monotonic() < self._deadline:
            return False
        self._give_up("it took too long")
        return True

    def take(self) -> tuple[list[Page], int]:
        """The loaded pages, from the first without a gap, and how many of them, from the first, are content-hashed."""
        pages, self._pages = self._pages, []
        pairs = zip(pages, self._shared, strict=False)
        return pages, next((i for i, (page, page_id) in enumerate(pairs) if page.id != page_id), len(pages))

    def close(self) -> None:
        """Cancels all calls and releases the loaded pages."""
        if self._match is not None:
            self._match.cancel()
        for call in self._calls:
            if not call.cancel():
                call.add_done_callback(self._release)
        self._calls.clear()
        self._originals.forget([page.id for page in self._pages])
        self._pages = []

    def _take_in(self, reply: list[Page | None]) -> None:
        found = reply.index(None) if None in reply else len(reply)
        self._pages += [page for page in reply[:found] if page is not None]
        if found < len(reply):  # a page was lost since the match
            self._originals.forget([page.id for page in reply[found:] if page is not None])
            del self._ids[len(self._pages) :]
            self._give_up("a page was lost")

    def _give_up(self, reason: str) -> None:
        """Ends the load with the pages that have arrived."""
        metrics.prefix_failures.inc()
        if once("prefix"):
            log.warning("a stored prefix could not be loaded completely; the rest is computed", reason=reason)
        pages, self._pages = self._pages, []
        self.close()
        self._pages = pages

    def _release(self, call: Future[list[Page | None]]) -> None:
        """Releases the pages of a call that was abandoned."""
        if not call.cancelled() and call.exception() is None:
            self._originals.forget([page.id for page in call.result() if page is not None])
