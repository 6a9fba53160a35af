"""Prompts whose beginning is stored: loaded instead of computed, on any worker of the same store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
import torch
from prometheus_client import REGISTRY
from qaq.v1 import common_pb2

from qaq_core import InProcessOriginals, OriginalsError, Page, PageShape
from qaq_core.models import LoadedModel
from tests.services.worker.conftest import EXACT, LISTS, STORY, Gate, MakeScheduler, expected, outcome, request

Ids = Callable[[str], list[int]]
SMALL = {"page_tokens": 16, "prefix_recompute_tokens": 1}


def failures() -> float:
    return REGISTRY.get_sample_value("qaq_prefix_failures_total") or 0.0


async def test_a_stored_prefix_is_loaded(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, gate: Gate
) -> None:
    gate.open()
    shared, tails = ids(STORY * 4), (ids(LISTS), ids("And then the storm came. " * 4))
    whole = len(shared) // 16 * 16
    store = InProcessOriginals()
    async with make_scheduler(store, **SMALL) as first, make_scheduler(store, **SMALL) as second:
        told = await outcome(first.submit(request(shared + tails[0], 2, cache=EXACT, session_id="a", keep=True)))
        assert told.done is not None
        assert told.done.usage.loaded_tokens == 0
        for scheduler in (first, second):
            gate.batches.clear()
            result = await outcome(scheduler.submit(request(shared + tails[1], 6, cache=EXACT)))
            assert result.tokens == expected(smollm2, shared + tails[1], 6)
            assert result.done is not None
            assert result.done.usage.loaded_tokens == whole
            assert gate.batches[0] == (1, len(shared + tails[1]) - whole)
            assert result.progress[0][0] == whole
            assert result.pages[: whole // 16] == told.pages[: whole // 16]
        same = await outcome(second.submit(request(shared + tails[0], 2, cache=EXACT)))
        assert same.done is not None
        assert same.done.usage.loaded_tokens == (len(shared + tails[0]) - 1) // 16 * 16


async def test_with_fp16_no_stored_token_is_computed_for_its_attention(make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens, store = ids(STORY * 8), InProcessOriginals()
    async with make_scheduler(store, page_tokens=16) as scheduler:
        await outcome(scheduler.submit(request(tokens, 1, cache=EXACT, session_id="a", keep=True)))
        for cache, computed in ((EXACT, 1), (common_pb2.CacheParams(preset="balanced"), 128)):
            done = (await outcome(scheduler.submit(request(tokens, 1, cache=cache)))).done
            assert done is not None
            assert done.usage.loaded_tokens == (len(tokens) - computed) // 16 * 16 > 0


async def test_a_hit_holds_the_bits_that_computing_it_gives(make_scheduler: MakeScheduler, ids: Ids) -> None:
    shared, tails = ids(STORY * 4), (ids(LISTS), ids("And then the storm came. " * 4))
    whole = len(shared) // 16 * 16
    stores, settings = [InProcessOriginals() for _ in range(2)], {**SMALL, "prefill_chunk": whole}
    async with make_scheduler(stores[0], **settings) as one, make_scheduler(stores[1], **settings) as apart:
        kept = {"cache": EXACT, "keep": True}
        await outcome(one.submit(request(shared + tails[0], 1, session_id="a", **kept)))
        hit = await outcome(one.submit(request(shared + tails[1], 1, session_id="b", **kept)))
        alone = await outcome(apart.submit(request(shared + tails[1], 1, session_id="b", **kept)))
        assert hit.done is not None
        assert hit.done.usage.loaded_tokens == whole
        names, shape = hit.pages[: whole // 16], one.sessions.methods.get(EXACT).page_shape
        assert names == alone.pages[: whole // 16]
        loaded, computed = (store.fetch(names, shape).result() for store in stores)
    for mine, theirs in zip(loaded, computed, strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine.data, theirs.data)


async def test_a_secret_hides_a_prefix(make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens, store = ids(STORY * 4), InProcessOriginals()
    async with (
        make_scheduler(store, secret="the secret of one deployment", **SMALL) as one,
        make_scheduler(store, secret="the secret of another", **SMALL) as two,
    ):
        held = await outcome(one.submit(request(tokens, 1, cache=EXACT, session_id="s", keep=True)))
        loaded = []
        for scheduler in (one, two):
            done = (await outcome(scheduler.submit(request(tokens, 1, cache=EXACT)))).done
            assert done is not None
            loaded.append(done.usage.loaded_tokens)
    assert loaded == [len(held.pages) * 16 - (16 if len(tokens) % 16 == 0 else 0), 0]


@pytest.mark.parametrize("sharing", ["tenant", "all"])
async def test_tenants_share_a_prefix_only_on_purpose(make_scheduler: MakeScheduler, ids: Ids, sharing: str) -> None:
    tokens = ids(STORY)
    async with make_scheduler(prefix_sharing=sharing, **SMALL) as scheduler:
        await outcome(scheduler.submit(request(tokens, 1, cache=EXACT, session_id="s", keep=True, tenant="a")))
        loaded = {}
        for tenant in ("a", "b", ""):
            done = (await outcome(scheduler.submit(request(tokens, 1, cache=EXACT, tenant=tenant)))).done
            assert done is not None
            loaded[tenant] = done.usage.loaded_tokens
    whole = (len(tokens) - 1) // 16 * 16
    assert loaded == {"a": whole, "b": whole, "": whole} | ({} if sharing == "all" else {"b": 0, "": 0})


async def test_a_session_goes_on_on_another_worker(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, gate: Gate
) -> None:
    """Pages of generated tokens are found by their told names; what they hold is what this session computed."""
    gate.open()
    log, store = ids(STORY), InProcessOriginals()
    async with make_scheduler(store, **SMALL) as first, make_scheduler(store, **SMALL) as second:
        turn = await outcome(first.submit(request(log, 40, cache=EXACT, session_id="s", keep=True)))
        log = log + turn.tokens + ids(LISTS)
        gate.batches.clear()
        moved = request(log, 6, cache=EXACT, session_id="s", keep=True, page_ids=turn.pages)
        result = await outcome(second.submit(moved))
        assert result.done is not None
        assert result.done.usage.loaded_tokens == len(turn.pages) * 16 >= 48
        assert gate.batches[0] == (1, len(log) - len(turn.pages) * 16)
        assert result.tokens == expected(smollm2, log, 6)
        # Who has only the tokens finds the prompt's pages, not those of the answer.
        stranger = await outcome(second.submit(request(log, 1, cache=EXACT)))
        assert stranger.done is not None
        assert stranger.done.usage.loaded_tokens == len(ids(STORY)) // 16 * 16


class Troubled(InProcessOriginals):
    """A real store with one trouble."""

    def __init__(self, trouble: str) -> None:
        super().__init__()
        self.trouble = trouble

    def match(self, page_ids: Sequence[bytes]) -> Future[int]:
        if self.trouble in ("fails", "silent"):
            answer: Future[int] = Future()
            if self.trouble == "fails":
                answer.set_exception(OriginalsError("no cache service answers"))
            return answer
        return super().match(page_ids)

    def fetch(self, page_ids: Sequence[bytes], shape: PageShape) -> Future[list[Page | None]]:
        pages = super().fetch(page_ids, shape).result()
        if self.trouble == "lost":
            self.forget(page_ids[1:2])
            pages[1] = None
        answer: Future[list[Page | None]] = Future()
        answer.set_result(pages)
        return answer


@pytest.mark.parametrize(("trouble", "loaded"), [("fails", 0), ("silent", 0), ("lost", 16)])
async def test_what_cannot_be_loaded_is_computed(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, trouble: str, loaded: int
) -> None:
    tokens, store = ids(STORY * 3), Troubled("")
    async with make_scheduler(store, prefix_timeout_s=0.2, **SMALL) as scheduler:
        await outcome(scheduler.submit(request(tokens, 1, cache=EXACT, session_id="s", keep=True)))
        store.trouble, before = trouble, failures()
        other = asyncio.create_task(outcome(scheduler.submit(request(ids(LISTS), 12, cache=EXACT))))
        result = await outcome(scheduler.submit(request(tokens, 4, cache=EXACT)))
        assert result.tokens == expected(smollm2, tokens, 4)
        assert result.done is not None
        assert result.done.usage.loaded_tokens == loaded
        assert failures() > before
        assert (await other).tokens == expected(smollm2, ids(LISTS), 12)
        await asyncio.wrap_future(scheduler.drop("s"))
    store.trouble = ""
    assert store.nbytes == 0  # whatever came too late, or was not used, is forgotten too


class Late(InProcessOriginals):
    """Answers the first question only when the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Future[int] | None = None

    def match(self, page_ids: Sequence[bytes]) -> Future[int]:
        if self.first is not None:
            return super().match(page_ids)
        self.first = Future()
        return self.first


async def test_a_prompt_does_not_wait_for_what_another_one_loads(make_scheduler: MakeScheduler, ids: Ids) -> None:
    store = Late()
    async with make_scheduler(store, prefix_timeout_s=300, **SMALL) as scheduler:
        waits = scheduler.submit(request(ids(STORY * 2), 2, cache=EXACT))
        goes = await outcome(scheduler.submit(request(ids(LISTS * 2), 2, cache=EXACT)))
        assert len(goes.tokens) == 2
        assert waits.replies.empty()
        assert store.first is not None
        store.first.set_result(0)
        assert len((await outcome(waits)).tokens) == 2


async def test_reuse_can_be_off(make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY * 3)
    async with make_scheduler(prefix_reuse=False, **SMALL) as scheduler:
        for _ in range(2):
            result = await outcome(scheduler.submit(request(tokens, 1, cache=EXACT, session_id="s", keep=True)))
            assert result.done is not None
            assert result.done.usage.loaded_tokens == 0
