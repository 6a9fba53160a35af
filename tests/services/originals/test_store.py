"""PageStore: what is in Redis, and what becomes of it when it is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from redis.asyncio import Redis

from qaq_core.base.errors import CorruptPageError
from qaq_core.base.pages import Page
from qaq_core.base.rows import RowRequest
from services.common import metrics
from services.common.errors import InvalidArgument
from services.originals.store import HEADER_BYTES, PageStore, pack_page, unpack_page
from tests.services.metric import value
from tests.services.originals.conftest import SHAPE, make_pages
from tests.services.originals.test_index import measured


def key(page: Page) -> str:
    return f"qaq:page:{page.id.hex()}"


def keys_and_values(pages: list[Page], layer: list[int], side: list[int], head: int, position: list[int]) -> RowRequest:
    """All bytes of the rows at these addresses."""
    number = len(layer)
    widths = np.full(number, 16, np.uint8)
    return RowRequest(
        shape=SHAPE,
        page_ids={page: pages[page].id for page in {at // SHAPE.tokens for at in position}},
        layer=np.array(layer, np.int16),
        head=np.full(number, head, np.int16),
        position=np.array(position, np.int32),
        side=np.array(side, np.uint8),
        have=0 * widths,
        want=widths,
        meta=np.zeros((number, 1), np.uint8),
    )


@pytest.fixture
def store(redis: Redis) -> PageStore:
    return PageStore(redis, ttl_s=600)


async def put(store: PageStore, pages: list[Page]) -> list[bool]:
    return [await store.put(page.id, page.shape, page.to_bytes()) for page in pages]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
async def test_a_page_comes_back_as_it_was(store: PageStore, redis: Redis, dtype: str) -> None:
    (page,) = make_pages(1, dataclasses.replace(SHAPE, dtype=dtype))
    assert await put(store, [page]) == [True]
    stored = await store.get(page.id)
    assert stored is not None
    shape, data = stored
    assert shape == page.shape
    assert torch.equal(Page.from_bytes(page.id, shape, bytes(data)).data, page.data)
    assert await redis.strlen(key(page)) == HEADER_BYTES + shape.nbytes
    assert 0 < await redis.ttl(key(page)) <= 600


async def test_a_known_page_is_kept_and_its_life_prolonged(store: PageStore, redis: Redis) -> None:
    (page,) = make_pages(1)
    await put(store, [page])
    await redis.expire(key(page), 5)
    other = Page(page.id, page.shape, page.data + 1)
    assert await put(store, [other]) == [False]
    assert await redis.ttl(key(page)) > 500
    stored = await store.get(page.id)
    assert stored is not None
    assert bytes(stored[1]) == bytes(page.to_bytes())


@pytest.mark.parametrize("place", [0, 4, 8, 24, 40, HEADER_BYTES, HEADER_BYTES + SHAPE.nbytes - 1])
async def test_a_corrupt_page_is_missing_counted_and_can_be_put_again(
    store: PageStore, redis: Redis, place: int
) -> None:
    (page,) = make_pages(1, seed=place)
    await put(store, [page])
    byte = (await redis.getrange(key(page), place, place))[0]
    await redis.setrange(key(page), place, bytes([byte ^ 0x40]))
    before = value(metrics.originals_corrupt)
    assert await store.get(page.id) is None
    assert value(metrics.originals_corrupt) == before + 1
    assert await put(store, [page]) == [True]
    assert await store.get(page.id) is not None


def test_every_truncation_is_noticed() -> None:
    (page,) = make_pages(1)
    raw = pack_page(page.shape, page.to_bytes())
    for size in (0, 1, HEADER_BYTES - 1, HEADER_BYTES, len(raw) - 1):
        with pytest.raises(CorruptPageError):
            unpack_page(raw[:size])
    with pytest.raises(CorruptPageError):
        unpack_page(raw + b"\0")


async def test_a_page_that_was_replaced_meanwhile_is_not_removed(store: PageStore, redis: Redis) -> None:
    (page,) = make_pages(1)
    await put(store, [page])
    await store._discard(key(page), b"what was there before")
    assert await redis.exists(key(page))


async def test_rows(store: PageStore, redis: Redis) -> None:
    pages = make_pages(3)
    await put(store, pages[:2])
    await redis.setrange(key(pages[1]), 0, b"JUNK")
    rows = await store.rows(keys_and_values(pages, [2, 0, 1, 0], [1, 0, 1, 0], 1, [3, 7, 3, 11]))
    assert rows[1] is None  # corrupt
    assert rows[3] is None  # missing
    assert rows[0] == pages[0].data[2, 1, 1, 3].numpy().tobytes()
    assert rows[2] == pages[0].data[1, 1, 1, 3].numpy().tobytes()
    assert store.row_reads == 2


async def test_rows_of_a_cut_off_value_are_missing(store: PageStore, redis: Redis) -> None:
    (page,) = make_pages(1)
    await redis.set(key(page), pack_page(page.shape, page.to_bytes())[: HEADER_BYTES + 3 * SHAPE.row_bytes + 1])
    rows = await store.rows(keys_and_values([page], [0, 0, 0], [0, 0, 0], 0, [0, 2, 3]))
    assert [row is not None for row in rows] == [True, True, False]


async def test_rows_of_another_shape_are_refused(store: PageStore) -> None:
    (page,) = make_pages(1)
    await put(store, [page])
    other = dataclasses.replace(SHAPE, tokens=8)
    with pytest.raises(InvalidArgument, match="is stored as"):
        await store.rows(dataclasses.replace(keys_and_values([page], [0], [0], 0, [0]), shape=other))


async def test_match_stops_at_the_first_gap(store: PageStore) -> None:
    pages = make_pages(5)
    ids = [page.id for page in pages]
    assert await store.match(ids) == 0
    await put(store, pages[:2] + pages[3:])
    assert await store.match(ids) == 2
    await put(store, pages)
    assert await store.match(ids) == 5
    assert await store.match([]) == 0


async def test_touch_and_size(store: PageStore, redis: Redis) -> None:
    pages = make_pages(3)
    await put(store, pages[:2])
    await redis.expire(key(pages[0]), 5)
    assert await store.touch([page.id for page in pages]) == 2
    assert await redis.ttl(key(pages[0])) > 500
    assert await store.size() == (2, 2 * (HEADER_BYTES + SHAPE.nbytes))


async def test_codecs(store: PageStore) -> None:
    assert await store.get_codec(bytes(16)) is None
    await store.put_codec(bytes(16), b"tables")
    assert await store.get_codec(bytes(16)) == b"tables"


async def test_a_codec_lives_as_long_as_pages_and_can_be_replaced(store: PageStore, redis: Redis) -> None:
    await store.put_codec(bytes(16), b"damaged tables")
    await store.put_codec(bytes(16), b"tables")
    assert await store.get_codec(bytes(16)) == b"tables"
    assert 0 < await redis.ttl(f"qaq:codec:{bytes(16).hex()}") <= 600
    assert await store.stored_bytes() == await measured(redis, f"qaq:codec:{bytes(16).hex()}")
