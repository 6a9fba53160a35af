"""Pages of a session are named by their content."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest

from qaq_core import InProcessOriginals, Page, PageShape, page_id
from qaq_core.models import LoadedModel
from services.worker.session import PageNames, page_salt
from tests.services.worker.conftest import Ids, MakeScheduler, outcome, request, until

SHAPE = PageShape(layers=2, kv_heads=1, tokens=4, head_dim=8)


def names_of(log: Sequence[int], salt: bytes = b"", model: str = "model", exact_prefix: int = 999) -> PageNames:
    return PageNames(model, SHAPE, salt, log, lambda: exact_prefix)


def test_names_chain_over_the_log() -> None:
    log = list(range(8))
    names = names_of(log, b"salt")
    second = names(1)
    first = page_id("model", "float32", b"salt", b"", [0, 1, 2, 3])
    assert names(0) == first
    assert second == page_id("model", "float32", b"salt", first, [4, 5, 6, 7])
    log += range(8, 12)
    assert names(2) == names.shared(2) == page_id("model", "float32", b"salt", second, [8, 9, 10, 11])


def test_same_text_after_another_start_is_another_page() -> None:
    one, two = names_of([0, 0, 0, 0, 1, 2, 3, 4]), names_of([9, 0, 0, 0, 1, 2, 3, 4])
    assert one(1) != two(1)
    assert one(0) != names_of([0, 0, 0, 0], b"salt")(0)
    assert one(0) != names_of([0, 0, 0, 0], model="other")(0)


def test_a_page_that_is_not_faithful_has_a_name_of_its_own() -> None:
    """Page 0 was computed over full precision, the last token of page 1 was not."""
    one, two = names_of(range(8), exact_prefix=7), names_of(range(8), exact_prefix=7)
    assert one(0) == two(0) == one.shared(0)
    assert len({one(1), two(1), one.shared(1)}) == 3


def test_a_page_is_not_named_before_its_tokens_are_known() -> None:
    with pytest.raises(IndexError, match="before its tokens"):
        names_of([1, 2, 3, 4, 5])(1)


async def test_pages_of_two_turns(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Callable[[str], list[int]]
) -> None:
    """The prompt's pages have names that follow from it; later ones are found by being told, over both turns."""
    store = InProcessOriginals()
    log = prompt = ids("The tide tables were pinned beside the door. " * 5)
    told: list[bytes] = []
    async with make_scheduler(store, page_tokens=16, secret="a secret of a deployment") as scheduler:
        for _ in range(2):
            result = await outcome(scheduler.submit(request(log, 20, session_id="s", keep=True)))
            log = [*log, *result.tokens]
            told = result.pages
        assert store.match(told).result() == len(told) == (len(log) - 1) // 16
        names, parent, salt = [], b"", page_salt("a secret of a deployment", "")
        for start in range(0, len(log) // 16 * 16, 16):
            parent = page_id(smollm2.fingerprint, "float32", salt, parent, log[start : start + 16])
            names.append(parent)
        shared = len(prompt) // 16
        assert told[:shared] == names[:shared]
        assert store.match(names).result() == shared >= 3


class Counting(InProcessOriginals):
    """Counts holders as a shared store does, for which a session that rests holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.held: Counter[bytes] = Counter()

    def put(self, pages: Sequence[Page]) -> Future[None]:
        self.held.update(page.id for page in pages)
        return super().put(pages)

    def hold(self, page_ids: Sequence[bytes]) -> None:
        self.held.update(page_ids)
        super().hold(page_ids)

    def forget(self, page_ids: Sequence[bytes]) -> None:
        self.held.subtract(page_ids)
        super().forget(page_ids)

    def rest(self, page_ids: Sequence[bytes]) -> None:
        self.held.subtract(page_ids)

    def wake(self, page_ids: Sequence[bytes]) -> None:
        self.held.update(page_ids)


async def test_only_running_sessions_hold_their_pages(make_scheduler: MakeScheduler, ids: Ids) -> None:
    store, log = Counting(), ids("The tide tables were pinned beside the door. " * 4)
    pages = len(log) // 16
    async with make_scheduler(store, page_tokens=16, prefix_reuse=False, max_idle_sessions=2) as scheduler:
        first = await outcome(scheduler.submit(request(log, 4, session_id="s", keep=True)))
        await until(lambda: sum(store.held.values()) == 0)  # the end is told before the session is left
        running = scheduler.submit(request(log + first.tokens, 3000, session_id="s", keep=True))
        await until(lambda: sum(store.held.values()) >= pages)
        scheduler.cancel(running.call)
        await until(lambda: sum(store.held.values()) == 0)
        for other in "abc":  # the idle ones are evicted or dropped, one after the other
            await outcome(scheduler.submit(request(log, 2, session_id=other, keep=True)))
        await asyncio.wrap_future(scheduler.drop("c"))
    assert set(store.held.values()) == {0}
    assert store.nbytes == 0


def test_page_ids_are_keyed_with_the_secret_and_the_tenant() -> None:
    salts = {page_salt(secret, tenant) for secret in ("a secret" * 4, "another." * 4) for tenant in ("", "a", "b")}
    assert len(salts) == 6
