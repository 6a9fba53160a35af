"""The interface of a store of originals, and a store in the memory of this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np
import torch

from qaq_core.base.pages import Page, PageShape
from qaq_core.base.rows import RowReply, RowRequest
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.storage.held_values import HeldValues, check_held_values, rounded

T = TypeVar("T")


class Originals(Protocol):
    """A store of originals. Calls return at once; futures carry the outcome.

    Errors inside a future are `OriginalsError`. The caller of `put` keeps its pages until the future is done.
    """

    @property
    def pending_bytes(self) -> int:
        """Bytes of pages put here that the store has neither acknowledged nor refused. Thread-safe."""
        ...

    def put(self, pages: Sequence[Page]) -> Future[None]:
        """Stores pages and holds them; done when the store has acknowledged all of them."""
        ...

    def requantize(self, request: RowRequest, quantizer: Quantizer) -> Future[RowReply]:
        """Quantizes rows again from their originals."""
        ...

    def match(self, page_ids: Sequence[bytes]) -> Future[int]:
        """Length of the longest chain of pages, from the first, that is stored."""
        ...

    def fetch(self, page_ids: Sequence[bytes], shape: PageShape) -> Future[list[Page | None]]:
        """Pages in the order of their ids, None where one is missing; holds those found, as `put` does."""
        ...

    def hold(self, page_ids: Sequence[bytes]) -> None:
        """Holds pages, put or fetched before, for one more sequence."""
        ...

    def forget(self, page_ids: Sequence[bytes]) -> None:
        """Ends one hold of each page. A page that nobody holds may be dropped; a shared store may keep it."""
        ...

    def rest(self, page_ids: Sequence[bytes]) -> None:
        """Their holder pauses: a shared store may drop the pages when it needs room for those of others."""
        ...

    def wake(self, page_ids: Sequence[bytes]) -> None:
        """The holder of `rest` goes on: it holds those of the pages that are still there."""
        ...


class InProcessOriginals:
    """Originals in the memory of this process, the CPU memory of arXiv 2403.04643. Every future is done at once.

    Args:
        values: "float16" and "int8" round pages, as a cache service does that stores them so.
    Raises:
        ConfigError: values are none of these.
    """

    def __init__(self, values: HeldValues = "exact") -> None:
        self._values = check_held_values(values)
        self._pages: dict[bytes, Page] = {}
        self._holders: Counter[bytes] = Counter()

    pending_bytes = 0

    @property
    def nbytes(self) -> int:
        return sum(page.shape.nbytes for page in self._pages.values())

    def put(self, pages: Sequence[Page]) -> Future[None]:
        self._pages.update((page.id, replace(page, data=rounded(page.data, self._values))) for page in pages)
        self._holders.update(page.id for page in pages)
        return _done(None)

    def requantize(self, request: RowRequest, quantizer: Quantizer) -> Future[RowReply]:
        return _done(requantize_from(self._pages, request, quantizer))

    def match(self, page_ids: Sequence[bytes]) -> Future[int]:
        count = next((i for i, page_id in enumerate(page_ids) if page_id not in self._pages), len(page_ids))
        return _done(count)

    def fetch(self, page_ids: Sequence[bytes], shape: PageShape) -> Future[list[Page | None]]:
        self._holders.update(page_id for page_id in page_ids if page_id in self._pages)
        return _done([self._pages.get(page_id) for page_id in page_ids])

    def hold(self, page_ids: Sequence[bytes]) -> None:
        self._holders.update(page_ids)

    def forget(self, page_ids: Sequence[bytes]) -> None:
        for page_id in page_ids:
            self._holders[page_id] -= 1
            if self._holders[page_id] <= 0:
                self._pages.pop(page_id, None)
                del self._holders[page_id]

    def rest(self, page_ids: Sequence[bytes]) -> None:
        """Does nothing: pages of this process are not dropped for others."""

    def wake(self, page_ids: Sequence[bytes]) -> None:
        """Does nothing: they have not been dropped."""


def requantize_from(pages: Mapping[bytes, Page], request: RowRequest, quantizer: Quantizer) -> RowReply:
    """Replies to a request from pages in memory; rows of absent pages are not found."""
    held = [number for number, page_id in request.page_ids.items() if page_id in pages]
    found = np.isin(request.page, held)
    part = request.select(found)
    originals = torch.empty(len(part), part.shape.head_dim)
    page, row = part.page, torch.from_numpy(part.offset // part.shape.row_bytes)
    for number, page_id in part.page_ids.items():
        mine = torch.from_numpy(np.flatnonzero(page == number))
        originals[mine] = pages[page_id].data.reshape(-1, part.shape.head_dim)[row[mine]].float()
    return RowReply(found, quantizer.requantize(part, originals))


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
