"""Staging: the originals of one sequence that the store has not acknowledged yet, in host memory.

Every new key and value is copied here first. A complete page is sent to the store and kept here until the store
has acknowledged it, so an original is only dropped when the store has it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
import torch

from qaq_core.base.errors import OriginalsError
from qaq_core.base.pages import Page, PageShape
from qaq_core.base.rows import RowReply, RowRequest
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.storage.arriving import Arriving
from qaq_core.storage.host_pages import HostPages
from qaq_core.storage.originals import Originals, requantize_from

_GROWING_ID = b"the page that is still growing".ljust(32, b".")
"""Id of the page that is not complete. It never leaves this process."""

log = logging.getLogger(__name__)


class Staging:
    """The pages of one sequence: the growing one, those sent but not acknowledged, and the names of those stored.

    Args:
        page_name: gives the id of page i; called once its tokens are complete, and again when a page that was cropped
            is complete anew. Other content must get another id.
        host_pages: keeps pages after the store has acknowledged them.

    Attributes:
        refused: pages that the store has refused for good.
    """

    def __init__(
        self,
        shape: PageShape,
        originals: Originals,
        page_name: Callable[[int], bytes],
        host_pages: HostPages | None = None,
    ) -> None:
        self.shape, self.originals, self._page_name = shape, originals, page_name
        self.host_pages = host_pages
        self._names: list[bytes] = []
        self._tokens = self._stored = self.refused = 0
        self._growing: torch.Tensor | None = None
        self._staged: dict[bytes, Page] = {}
        self._under_way: dict[bytes, Future[None]] = {}
        self._expected: tuple[Arriving, int] | None = None
        self._arriving: deque[tuple[Arriving, int]] = deque()

    @property
    def names(self) -> list[bytes]:
        """Ids of the complete pages, in order."""
        self._arrive()
        return self._names

    @property
    def tokens(self) -> int:
        """Tokens appended so far."""
        self._arrive()
        return self._tokens

    @property
    def stored(self) -> int:
        """Pages, from the first without a gap, that the store has acknowledged."""
        self._arrive()
        return self._stored

    @property
    def nbytes(self) -> int:
        """Host bytes of originals that are not acknowledged."""
        self._arrive()
        growing = self.shape.nbytes if self._growing is not None else 0
        return growing + sum(page.shape.nbytes for page in self._staged.values())

    def resume(self, names: Sequence[bytes]) -> None:
        """Begins the sequence with pages that are stored already."""
        self._names += names
        self._tokens += len(names) * self.shape.tokens
        self._stored = len(self._names)

    def expect(self, arriving: Arriving, index: int) -> None:
        """The tokens that are appended next are under way already: those at an index of what arrives."""
        self._expected = arriving, index

    def append(self, originals: torch.Tensor) -> None:
        """Copies the next tokens' originals [layers, 2, kv_heads, n, head_dim] in the model's dtype.

        Those that are under way already become part of a page when they are needed, or the next ones come.
        """
        self._arrive()
        if self._expected is None:
            self._take(originals.cpu())
        else:
            self._arriving.append(self._expected)
            self._expected = None
        self._collect()

    def _arrive(self) -> None:
        """Takes in what is under way."""
        while self._arriving:
            arriving, index = self._arriving.popleft()
            self._take(arriving.here()[index])

    def _take(self, originals: torch.Tensor) -> None:
        done = 0
        while done < originals.shape[3]:
            slot = self._tokens % self.shape.tokens
            count = min(self.shape.tokens - slot, originals.shape[3] - done)
            if self._growing is None:
                self._growing = torch.empty(self.shape.dims, dtype=self.shape.torch_dtype)
            self._growing[:, :, :, slot : slot + count] = originals[:, :, :, done : done + count]
            self._tokens += count
            done += count
            if slot + count == self.shape.tokens:
                self._complete()

    def _complete(self) -> None:
        assert self._growing is not None
        page = Page(self._page_name(len(self._names)), self.shape, self._growing)
        self._names.append(page.id)
        self._growing = None
        self._staged[page.id] = page
        self._under_way[page.id] = self.originals.put([page])

    def collect(self) -> None:
        """Drops acknowledged pages. The store retries by itself: a page that it refuses for good stays here."""
        self._arrive()
        self._collect()

    def _collect(self) -> None:
        for name, future in list(self._under_way.items()):
            if not future.done():
                continue
            del self._under_way[name]
            if future.cancelled() or future.exception() is not None:
                self.refused += 1
                log.warning("the store refused a page, which stays in this process: %s", _reason(future))
            else:
                page = self._staged.pop(name)
                if self.host_pages is not None:
                    self.host_pages.add(page)
        while self._stored < len(self._names) and self._names[self._stored] not in self._staged:
            self._stored += 1

    def page_ids(self, position: np.ndarray) -> dict[int, bytes]:
        """Page number -> id of the pages that hold some positions, int [n], for a `RowRequest`."""
        names = (*self.names, _GROWING_ID)
        return {page: names[page] for page in np.unique(position // self.shape.tokens).tolist()}

    def requantize(self, request: RowRequest, quantizer: Quantizer) -> list[tuple[np.ndarray, Future[RowReply]]]:
        """Quantizes the rows whose pages are here at once, and sends the others to the store.

        Args:
            request: rows of this sequence, with the ids that `page_ids` gives now.
        Returns:
            for each part of the request: int64 row indices, ascending, and the future of its reply.
        """
        self.collect()
        pages = dict(self._staged)
        if self.host_pages is not None:
            pages |= self.host_pages.get(request.page_ids.values())
        if self._growing is not None:
            pages[_GROWING_ID] = Page(_GROWING_ID, self.shape, self._growing)
        here = [page for page, page_id in request.page_ids.items() if page_id in pages]
        local = np.isin(request.page, here)
        parts: list[tuple[np.ndarray, Future[RowReply]]] = []
        if local.any():
            index = np.flatnonzero(local)
            reply: Future[RowReply] = Future()
            reply.set_result(requantize_from(pages, request.select(index), quantizer))
            parts.append((index, reply))
        if not local.all():
            index = np.flatnonzero(~local)
            parts.append((index, self.originals.requantize(request.select(index), quantizer)))
        return parts

    def read(self, first: int, last: int) -> torch.Tensor:
        """Originals of positions first..last-1: [layers, 2, kv_heads, n, head_dim]. Waits for the store.

        Raises:
            OriginalsError: the store failed, or has lost a page.
        """
        size = self.shape.tokens
        if first >= last:
            layers, sides, heads, _, dim = self.shape.dims
            return torch.empty(layers, sides, heads, 0, dim, dtype=self.shape.torch_dtype)
        self.collect()
        numbers = range(first // size, -(-last // size))
        stored = [self.names[i] for i in numbers if i < len(self.names) and self.names[i] not in self._staged]
        fetched = self._fetch(stored)
        data = []
        for i in numbers:
            if i == len(self.names):
                assert self._growing is not None
                data.append(self._growing)
            else:
                page = fetched.get(self.names[i]) or self._staged[self.names[i]]
                data.append(page.data)
        begin = numbers.start * size
        return torch.cat(data, 3)[:, :, :, first - begin : last - begin]

    def _fetch(self, names: Sequence[bytes]) -> dict[bytes, Page]:
        if not names:
            return {}
        pages = [page for page in self.originals.fetch(names, self.shape).result() if page is not None]
        self.originals.forget([page.id for page in pages])  # the sequence holds them already
        if len(pages) < len(names):
            raise OriginalsError(
                f"the store has lost {len(names) - len(pages)} of {len(names)} pages of originals that are needed: "
                "compute the sequence again from its tokens"
            )
        return {page.id: page for page in pages}

    def crop(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens. A complete page whose tail goes is open again.

        Raises:
            OriginalsError: that page cannot be read; then nothing has changed.
        """
        self._arrive()
        complete, rest = divmod(tokens, self.shape.tokens)
        if complete < len(self.names):
            head = self.read(tokens - rest, tokens)
            self._growing = None
            if rest:
                self._growing = torch.empty(self.shape.dims, dtype=self.shape.torch_dtype)
                self._growing[:, :, :, :rest] = head
            self._drop_pages(complete)
        elif not rest:
            self._growing = None
        self._tokens = tokens

    def _drop_pages(self, kept: int) -> None:
        """Releases the complete pages behind the first `kept`. Those under way still reach the store."""
        gone = self._names[kept:]
        del self._names[kept:]
        self.originals.forget(gone)
        for name in gone:
            self._staged.pop(name, None)
            self._under_way.pop(name, None)
        self._stored = min(self._stored, kept)

    def fork(self, page_name: Callable[[int], bytes]) -> Staging:
        """Staging of a sequence that begins with the same tokens and shares the complete pages."""
        other = Staging(self.shape, self.originals, page_name, self.host_pages)
        other._names, other._tokens, other._stored = list(self.names), self._tokens, self._stored
        other._growing = None if self._growing is None else self._growing.clone()
        other._staged, other._under_way = dict(self._staged), dict(self._under_way)
        self.originals.hold(self.names)
        return other

    def close(self) -> None:
        """Releases the sequence's pages; pages that were sent still reach the store."""
        self.originals.forget(self.names)
        self._growing = None
        self._staged.clear()
        self._under_way.clear()


def _reason(future: Future[None]) -> str:
    return "cancelled" if future.cancelled() else str(future.exception())
