"""Originals that a store has, kept in host memory as well while there is room: rows of them come at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from qaq_core.base.pages import Page


class HostPages:
    """Pages of all sequences of a process; those that were used longest ago go first. For one thread.

    Args:
        most_bytes: that pages may take; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self._pages: OrderedDict[bytes, Page] = OrderedDict()

    def add(self, page: Page) -> None:
        """Keeps a page, whose data must not change any more."""
        self.drop([page.id])
        self._pages[page.id] = page
        self.nbytes += page.shape.nbytes
        while self.nbytes > self.most_bytes:
            self.drop([next(iter(self._pages))])

    def get(self, page_ids: Iterable[bytes]) -> dict[bytes, Page]:
        """Those of the pages that are here."""
        found = {page_id: self._pages[page_id] for page_id in page_ids if page_id in self._pages}
        for page_id in found:
            self._pages.move_to_end(page_id)
        return found

    def drop(self, page_ids: Iterable[bytes]) -> None:
        """Forgets pages that will not be asked for again."""
        for page_id in page_ids:
            if (page := self._pages.pop(page_id, None)) is not None:
                self.nbytes -= page.shape.nbytes
