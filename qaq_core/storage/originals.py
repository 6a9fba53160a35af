"""What the cache asks of a store of originals, and the store that lives in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

import numpy as np
import torch

from qaq_core.base.pages import Page, PageShape
from qaq_core.base.rows import RowReply, RowRequest
from qaq_core.quantization.quantizer import Quantizer

T = TypeVar("T")


class Originals(Protocol):
    """A store of originals. Calls return at once; futures carry the outcome.

    Errors inside a future are `OriginalsError`; whoever put a page keeps it until its future is done.
    """

    @property
    def pending_bytes(self) -> int:
        """Of pages that were put here and that the store has neither acknowledged nor refused. For any thread."""
        ...

    def put(self, pages: Sequence[Page]) -> Future[None]:
        """Stores pages; done when the store has acknowledged all of them."""
        ...

    def requantize(self, request: RowRequest, quantizer: Quantizer) -> Future[RowReply]:
        """Quantizes rows again from their originals."""
        ...

    def match(self, page_ids: Sequence[bytes]) -> Future[int]:
        """How many pages of the chain, from the first, are stored."""
        ...

    def fetch(self, page_ids: Sequence[bytes], shape: PageShape) -> Future[list[Page | None]]:
        """Pages in the order asked for, None where one is missing; those found are held as if put."""
        ...

    def hold(self, page_ids: Sequence[bytes]) -> None:
        """One more sequence needs these, which the caller put or fetched: each will be forgotten once more."""
        ...

    def forget(self, page_ids: Sequence[bytes]) -> None:
        """The caller, who put or fetched these, will not ask for them again; a shared store may keep them."""
        ...


class InProcessOriginals:
    """Originals in this process's memory: the paper's CPU memory. Answers at once."""

    def __init__(self) -> None:
        self._pages: dict[bytes, Page] = {}
        self._holders: Counter[bytes] = Counter()

    pending_bytes = 0

    @property
    def nbytes(self) -> int:
        return sum(page.shape.nbytes for page in self._pages.values())

    def put(self, pages: Sequence[Page]) -> Future[None]:
        self._pages.update((page.id, page) for page in pages)
        self._holders.update(page.id for page in pages)
        return _done(None)

    def requantize(self, request: RowRequest, quantizer: Quantizer) -> Future[RowReply]:
        return _done(requantize_from(self._pages, request, quantizer))

    def match(self, page_ids: Sequence[bytes]) -> Future[int]:
        count = next((i for i, pid in enumerate(page_ids) if pid not in self._pages), len(page_ids))
        return _done(count)

    def fetch(self, page_ids: Sequence[bytes], shape: PageShape) -> Future[list[Page | None]]:
        self._holders.update(pid for pid in page_ids if pid in self._pages)
        return _done([self._pages.get(pid) for pid in page_ids])

    def hold(self, page_ids: Sequence[bytes]) -> None:
        self._holders.update(page_ids)

    def forget(self, page_ids: Sequence[bytes]) -> None:
        for pid in page_ids:
            self._holders[pid] -= 1
            if self._holders[pid] <= 0:
                self._pages.pop(pid, None)
                del self._holders[pid]


def requantize_from(pages: dict[bytes, Page], request: RowRequest, quantizer: Quantizer) -> RowReply:
    """Answers a request from pages in memory; rows of absent pages are not found."""
    held = np.array([pid in pages for pid in request.page_ids], dtype=bool)
    found = held[request.page] if len(request) else np.zeros(0, dtype=bool)
    part = request.select(found)
    rows = torch.empty(len(part), part.shape.head_dim)
    for index in np.unique(part.page):
        mine = np.flatnonzero(part.page == index)
        data = pages[part.page_ids[index]].data
        picked = data[
            torch.from_numpy(part.layer[mine].astype(np.int64)),
            torch.from_numpy(part.side[mine].astype(np.int64)),
            torch.from_numpy(part.head[mine].astype(np.int64)),
            torch.from_numpy(part.token[mine].astype(np.int64)),
        ]
        rows[torch.from_numpy(mine)] = picked.float()
    return RowReply(found, quantizer.requantize(part, rows))


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
