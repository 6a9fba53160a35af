"""PageStore with pages of every form: rows, damage, what is counted, and services that differ in their setting."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
import torch
from pydantic import SecretStr
from redis.asyncio import Redis

from qaq_core.base.pages import Page
from qaq_core.storage import rounded
from services.common import metrics
from services.common.embedded_redis import EmbeddedRedis
from services.common.errors import InvalidArgument
from services.common.settings import OriginalsSettings
from services.originals.client import RemoteOriginals
from services.originals.page_forms import FORMS, PageForm
from services.originals.seals import Seals
from services.originals.server import OriginalsServer
from services.originals.store import PageStore
from tests.services.metric import value
from tests.services.originals.conftest import SHAPE, getranges, make_pages, seal
from tests.services.originals.test_store import damage, every_row, key, put

LONG = dataclasses.replace(SHAPE, tokens=32, head_dim=64)


def in_form(redis: Redis, form: PageForm) -> PageStore:
    return PageStore(redis, ttl_s=600, form=form)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["plain", *FORMS])
async def test_pages_and_rows_come_back_from_any_service(redis: Redis, form: PageForm, dtype: str) -> None:
    """Whatever its own setting is; and rounded pages have a seal that their model accepts."""
    (page,) = make_pages(1, dataclasses.replace(LONG, dtype=dtype))
    before = value(metrics.page_plain_bytes), value(metrics.page_stored_bytes)
    assert await put(in_form(redis, form), [page]) == [True]
    assert value(metrics.page_plain_bytes) - before[0] == page.shape.nbytes
    assert value(metrics.page_stored_bytes) - before[1] == await redis.strlen(key(page))
    due = page.data if form in ("plain", "lossless") else rounded(page.data, form)
    for reader in (in_form(redis, "plain"), in_form(redis, "lossless")):
        assert await reader.holds(page.id)
        stored = await reader.get(page.id)
        assert stored is not None
        assert torch.equal(Page.from_bytes(page.id, stored[0], bytes(stored[2])).data, due)
        seals = Seals("")
        assert seals.is_own(stored[1])
        assert seals.fits(stored[1], page.id, stored[0], stored[2])


async def test_a_known_page_is_not_counted_again(redis: Redis) -> None:
    (page,) = make_pages(1)
    store = in_form(redis, "lossless")
    assert await put(store, [page]) == [True]
    before = value(metrics.page_plain_bytes)
    assert await put(store, [page]) == [False]
    assert value(metrics.page_plain_bytes) == before


async def test_rows_of_a_group_are_read_once(redis: Redis) -> None:
    """One small read for a row, and none for its neighbours; the same bits as from a plain page."""
    pages = make_pages(2)
    store = in_form(redis, "lossless")
    await put(store, pages)
    right = [row.tobytes() for page in pages for row in page.data.reshape(-1, SHAPE.head_dim).numpy()]
    before = await getranges(redis)
    assert await store.rows(every_row(pages)) == right
    groups = -(-len(right) // len(pages) // 16) * len(pages)
    assert await getranges(redis) - before == len(pages) + groups


@pytest.mark.parametrize("form", FORMS)
async def test_damage_is_missing_counted_and_its_page_can_be_put_again(redis: Redis, form: PageForm) -> None:
    (page,) = make_pages(1)
    store = in_form(redis, form)
    for place in (0, 4, 30, 60, 64, 66, 70, 100, 300, -1):
        await put(store, [page])
        whole = await store.rows(every_row([page]))
        await damage(redis, page, place % await redis.strlen(key(page)))
        before = value(metrics.originals_corrupt)
        rows = await store.rows(every_row([page]))
        assert all(row in (None, right) for row, right in zip(rows, whole, strict=True))
        assert None in rows
        assert value(metrics.originals_corrupt) == before + 1
        assert not await redis.exists(key(page))


async def test_other_shapes_are_refused_not_removed(redis: Redis) -> None:
    """Also where the pages that are stored have a longer index than the pages that are asked for."""
    (page,) = make_pages(1, LONG)
    store = in_form(redis, "lossless")
    await put(store, [page])
    with pytest.raises(InvalidArgument, match="is stored as"):
        await store.rows(every_row([Page(page.id, SHAPE, page.data)]))
    assert await store.holds(page.id)


async def test_a_worker_fetches_what_a_service_rounded(redis: Redis, redis_server: EmbeddedRedis) -> None:
    """Over the wire: the worker's own checks accept it."""
    server = OriginalsServer(OriginalsSettings(redis_url=SecretStr(redis_server.url), page_form="int8"))
    remote = RemoteOriginals.at([await server.start()])
    try:
        pages = make_pages(3, LONG)
        await asyncio.wrap_future(remote.put(pages))
        fetched = await asyncio.wrap_future(remote.fetch([page.id for page in pages], LONG))
        for page, back in zip(pages, fetched, strict=True):
            assert back is not None
            assert torch.equal(back.data, rounded(page.data, "int8"))
    finally:
        await asyncio.to_thread(remote.close)
        await server.stop()


def test_what_is_sealed_here_is_sealed_as_a_worker_does() -> None:
    (page,) = make_pages(1)
    assert Seals("").again(seal(page), page.id, page.shape, page.to_bytes()) == seal(page)
