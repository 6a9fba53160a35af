"""Staging: no original is dropped that the store has not acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import pytest
import torch

from qaq_core.base.errors import OriginalsError
from qaq_core.base.pages import Page, PageShape, unique_names
from qaq_core.storage.originals import InProcessOriginals
from qaq_core.storage.staging import Staging
from tests.core.rows import normal

SHAPE = PageShape(2, 2, 8, 16)


class SlowOriginals(InProcessOriginals):
    """A real store that acknowledges when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: list[tuple[list[Page], Future[None]]] = []

    def put(self, pages: Sequence[Page]) -> Future[None]:
        self.under_way.append((list(pages), Future()))
        return self.under_way[-1][1]

    def acknowledge(self) -> None:
        for pages, future in self.under_way:
            super().put(pages)
            future.set_result(None)
        self.under_way.clear()

    def refuse(self) -> None:
        for _, future in self.under_way:
            future.set_exception(OriginalsError("full"))
        self.under_way.clear()


def staging(originals: InProcessOriginals) -> Staging:
    return Staging(SHAPE, originals, lambda index: bytes([index]) * 32)


def named(originals: InProcessOriginals) -> Staging:
    """With ids that no two pages share."""
    return Staging(SHAPE, originals, unique_names())


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return normal(seed, 2, 2, 2, n, 16)


@pytest.mark.parametrize("pieces", [(20,), (1,) * 20, (7, 1, 12), (8, 8, 4), (3, 17)])
def test_pages_hold_the_tokens_in_order(pieces: tuple[int, ...]) -> None:
    store = InProcessOriginals()
    subject, whole, done = staging(store), tokens(20), 0
    for n in pieces:
        subject.append(whole[:, :, :, done : done + n])
        done += n
    assert subject.names == [bytes([0]) * 32, bytes([1]) * 32]
    for index, page in enumerate(store.fetch(subject.names, SHAPE).result(0)):
        assert page is not None
        assert torch.equal(page.data, whole[:, :, :, 8 * index : 8 * index + 8])
    assert subject.nbytes == SHAPE.nbytes  # the growing page
    assert store.nbytes == 2 * SHAPE.nbytes


def test_unacknowledged_pages_stay() -> None:
    store = SlowOriginals()
    subject = staging(store)
    subject.append(tokens(16))
    assert subject.nbytes == 2 * SHAPE.nbytes
    store.acknowledge()
    subject.collect()
    assert subject.nbytes == 0
    assert store.match(subject.names).result(0) == 2


def test_refused_pages_stay_here_and_are_counted() -> None:
    """A store sends a page again by itself; what it refuses for good is served from staging."""
    store = SlowOriginals()
    subject, whole = staging(store), tokens(8)
    subject.append(whole)
    store.refuse()
    for _ in range(3):
        subject.collect()
        assert not store.under_way
        assert (subject.refused, subject.nbytes) == (1, SHAPE.nbytes)


def test_staged_copies_do_not_follow_their_source() -> None:
    store = InProcessOriginals()
    subject, whole = staging(store), tokens(8)
    expected = whole.clone()
    subject.append(whole)
    whole.zero_()
    page = store.fetch(subject.names, SHAPE).result(0)[0]
    assert page is not None
    assert torch.equal(page.data, expected)


def test_closing_lets_the_store_forget() -> None:
    store = InProcessOriginals()
    subject = staging(store)
    subject.append(tokens(20))
    subject.close()
    assert (store.nbytes, subject.nbytes) == (0, 0)


def test_a_page_that_another_sequence_holds_is_not_forgotten() -> None:
    store = InProcessOriginals()
    first, second = staging(store), staging(store)
    for subject in (first, second):
        subject.append(tokens(8))
    first.close()
    assert store.match(second.names).result(0) == 1
    second.close()
    assert store.nbytes == 0


@pytest.mark.parametrize("store", [InProcessOriginals(), SlowOriginals()], ids=["stored", "under way"])
@pytest.mark.parametrize("kept", range(0, 29, 3))
def test_what_is_read_and_what_is_kept_are_the_originals(store: InProcessOriginals, kept: int) -> None:
    subject, whole, other = named(store), tokens(28), tokens(20, seed=1)
    subject.append(whole)
    before = list(subject.names)
    for first in range(0, 28, 5):
        assert torch.equal(subject.read(first, 28), whole[:, :, :, first:])
    subject.crop(kept)
    assert subject.tokens == kept
    assert subject.names == before[: kept // 8]
    subject.append(other)
    expected = torch.cat([whole[:, :, :, :kept], other], 3)
    assert torch.equal(subject.read(0, kept + 20), expected)
    assert subject.names[: kept // 8] == before[: kept // 8]
    assert not set(subject.names[kept // 8 :]) & set(before), "a page of other content needs another id"
    subject.close()
    if isinstance(store, SlowOriginals):
        store.acknowledge()
        store.forget(before + subject.names)
    assert store.nbytes == 0


def test_a_crop_that_lacks_an_original_changes_nothing() -> None:
    store = InProcessOriginals()
    subject, whole = named(store), tokens(20)
    subject.append(whole)
    names = list(subject.names)
    store.forget(names[1:])
    with pytest.raises(OriginalsError, match="lost 1 of 1 pages"):
        subject.crop(11)
    assert (subject.names, subject.tokens) == (names, 20)
    subject.crop(8)  # needs no original
    assert (subject.names, subject.nbytes) == (names[:1], 0)
    assert torch.equal(subject.read(0, 8), whole[:, :, :, :8])
