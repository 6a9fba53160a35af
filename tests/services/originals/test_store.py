"""PageStore: what is in Redis, and what becomes of it when it is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
import torch
from redis.asyncio import Redis

from qaq_core.base.pages import Page
from qaq_core.base.rows import RowRequest
from services.common import metrics
from services.common.embedded_redis import EmbeddedRedis
from services.common.errors import InvalidArgument
from services.common.redis import connect
from services.originals.page_format import CHECKSUM_BYTES, HEADER_BYTES, stored_bytes
from services.originals.page_forms import PageForm
from services.originals.store import PageStore
from tests.services.metric import value
from tests.services.originals.conftest import SHAPE, make_pages, seal
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


def every_row(pages: list[Page]) -> RowRequest:
    """All rows of some pages, in the order in which they are stored."""
    at = np.indices((len(pages), SHAPE.layers, 2, SHAPE.kv_heads, SHAPE.tokens)).reshape(5, -1)
    page, layer, side, head, token = at
    rows = keys_and_values(pages, layer.tolist(), side.tolist(), 0, (page * SHAPE.tokens + token).tolist())
    return dataclasses.replace(rows, head=head.astype(np.int16))


@pytest.fixture
def store(redis: Redis) -> PageStore:
    """Of plain pages, in which every row has its place; test_forms.py has the other forms."""
    return PageStore(redis, ttl_s=600, form="plain")


async def put(store: PageStore, pages: list[Page]) -> list[bool]:
    return [await store.put(page.id, page.shape, seal(page), page.to_bytes()) for page in pages]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
async def test_a_page_comes_back_as_it_was(store: PageStore, redis: Redis, dtype: str) -> None:
    (page,) = make_pages(1, dataclasses.replace(SHAPE, dtype=dtype))
    assert await put(store, [page]) == [True]
    stored = await store.get(page.id)
    assert stored is not None
    shape, mark, data = stored
    assert (shape, mark) == (page.shape, seal(page))
    assert torch.equal(Page.from_bytes(page.id, shape, bytes(data)).data, page.data)
    assert await redis.strlen(key(page)) == stored_bytes(shape)
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
    assert bytes(stored[2]) == bytes(page.to_bytes())


PLACES = {
    "magic": 0,
    "version": 4,
    "dtype": 6,
    "layers": 8,
    "head_dim": 20,
    "model": 24,
    "seal": 40,
    "checksum of the header": 56,
    "first row": HEADER_BYTES,
    "first checksum": HEADER_BYTES + SHAPE.row_bytes,
    "second row": HEADER_BYTES + SHAPE.row_bytes + CHECKSUM_BYTES,
    "last row": stored_bytes(SHAPE) - CHECKSUM_BYTES - 1,
    "last checksum": stored_bytes(SHAPE) - 1,
}


async def damage(redis: Redis, page: Page, place: int) -> None:
    byte = (await redis.getrange(key(page), place, place))[0]
    await redis.setrange(key(page), place, bytes([byte ^ 0x40]))


@pytest.mark.parametrize("name", PLACES)
async def test_a_corrupt_page_is_missing_counted_and_can_be_put_again(
    store: PageStore, redis: Redis, name: str
) -> None:
    (page,) = make_pages(1, seed=PLACES[name])
    await put(store, [page])
    await damage(redis, page, PLACES[name])
    before = value(metrics.originals_corrupt)
    assert await store.get(page.id) is None
    assert value(metrics.originals_corrupt) == before + 1
    assert not await redis.exists(key(page))
    assert await put(store, [page]) == [True]
    assert await store.get(page.id) is not None


@pytest.mark.parametrize("name", PLACES)
async def test_a_corrupt_row_is_missing_counted_and_its_page_can_be_put_again(
    store: PageStore, redis: Redis, name: str
) -> None:
    (page,) = make_pages(1, seed=PLACES[name])
    await put(store, [page])
    await damage(redis, page, PLACES[name])
    before = value(metrics.originals_corrupt)
    rows = await store.rows(every_row([page]))
    right = [row.tobytes() for row in page.data.reshape(-1, SHAPE.head_dim).numpy()]
    assert all(row in (None, original) for row, original in zip(rows, right, strict=True))
    lost = rows.count(None)
    assert lost == (len(rows) if PLACES[name] < HEADER_BYTES else 1)
    assert value(metrics.originals_corrupt) == before + 1
    assert not await redis.exists(key(page))
    assert await put(store, [page]) == [True]
    assert await store.rows(every_row([page])) == right


@pytest.mark.parametrize("form", ["plain", "lossless"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
async def test_a_page_that_is_no_numbers_is_missing_and_can_be_put_again(
    redis: Redis, form: PageForm, wrong: float
) -> None:
    """One that stands in Redis from earlier, sealed as it should be: without this it would stay, and be of no use."""
    store = PageStore(redis, ttl_s=600, form=form)
    (page,) = make_pages(1)
    bad = dataclasses.replace(page, data=page.data.clone())
    bad.data[2, 1, 0, 3, 5] = wrong
    await put(store, [bad])
    before = value(metrics.originals_corrupt)
    assert await store.get(page.id) is None
    assert value(metrics.originals_corrupt) == before + 1
    assert not await redis.exists(key(page))
    assert await put(store, [page]) == [True]
    stored = await store.get(page.id)
    assert stored is not None
    assert bytes(stored[2]) == bytes(page.to_bytes())


async def test_garbage_over_a_page_gives_no_row(store: PageStore, redis: Redis) -> None:
    pages = make_pages(2)
    await put(store, pages)
    garbage = np.random.default_rng(0).bytes(stored_bytes(SHAPE) - HEADER_BYTES)
    await redis.setrange(key(pages[0]), HEADER_BYTES, garbage)
    rows = await store.rows(every_row(pages))
    half = len(rows) // 2
    assert rows[:half] == [None] * half
    assert None not in rows[half:]


@pytest.mark.parametrize(
    "size", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + SHAPE.row_bytes + 5, -1, 4000, 40_000]
)
async def test_a_value_of_another_length_is_missing(store: PageStore, redis: Redis, size: int) -> None:
    """Cut off, or longer."""
    (page,) = make_pages(1)
    for read in (lambda: store.get(page.id), lambda: store.rows(every_row([page]))):
        await put(store, [page])
        raw = await redis.get(key(page))
        await redis.set(key(page), raw[:size].ljust(size, b"."))
        assert not any(await read() or [None])
        assert not await redis.exists(key(page))


async def test_a_key_that_is_no_string_is_missing_and_can_be_put_again(store: PageStore, redis: Redis) -> None:
    (page,) = make_pages(1)
    await put(store, [page])
    for read in (store.get(page.id), store.holds(page.id), store.rows(every_row([page]))):
        await redis.delete(key(page))
        await redis.hset(key(page), "a", "b")
        assert await read in (None, False, [None] * len(every_row([page])))
        assert not await redis.exists(key(page))
    assert await put(store, [page]) == [True]


async def test_what_was_stored_for_others_is_missing(store: PageStore, redis: Redis) -> None:
    """Another page's bytes under this id, a page of another secret, and one of an earlier version."""
    page, other = make_pages(2)
    await put(store, [page, other])
    own, others = await redis.get(key(page)), await redis.get(key(other))
    await PageStore(redis, 600, "another secret").put(make_pages(1, seed=7)[0].id, SHAPE, seal(page), page.to_bytes())
    foreign = await redis.get(key(make_pages(1, seed=7)[0]))
    mixed = own[:HEADER_BYTES] + others[HEADER_BYTES:]
    for stored in (others, foreign, mixed, own[:4] + b"\1\0" + own[6:]):
        for read in (lambda: store.get(page.id), lambda: store.rows(every_row([page]))):
            await redis.set(key(page), stored)
            assert not any(await read() or [None])
            assert not await redis.exists(key(page))


@pytest.mark.parametrize("change", [{"dtype": "float16", "tokens": 8}, {"layers": 6, "dtype": "bfloat16"}])
async def test_a_page_of_another_shape_keeps_its_own(store: PageStore, redis: Redis, change: dict) -> None:
    """The same bytes with another meaning: whoever asks by it learns what is there, and nothing is removed."""
    (page,) = make_pages(1)
    await put(store, [page])
    shape = dataclasses.replace(SHAPE, **change)
    with pytest.raises(InvalidArgument, match="is stored as"):
        await store.rows(dataclasses.replace(every_row([page]), shape=shape))
    stored = await store.get(page.id)
    assert stored is not None
    assert stored[0] == SHAPE


async def test_pages_after_a_restart_of_redis() -> None:
    """A server that lost nothing, one whose file was damaged, and one that lost everything."""
    pages = make_pages(12)
    request = every_row(pages)
    right = [row.tobytes() for page in pages for row in page.data.reshape(-1, SHAPE.head_dim).numpy()]
    with EmbeddedRedis(persist=True) as server:
        async with restarted(server) as store:
            await put(store, pages)
            assert await store.rows(request) == right
        async with restarted(server) as store:
            assert await store.rows(request) == right
        overwrite(server, [bytes(page.to_bytes()) for page in pages[:4]])
        async with restarted(server) as store:
            rows = await store.rows(request)
            assert all(row in (None, original) for row, original in zip(rows, right, strict=True))
            assert rows.count(None) == 4
            assert await put(store, pages) == [True] * 4 + [False] * 8
            assert await store.rows(request) == right
    with EmbeddedRedis() as empty:
        async with restarted(empty) as store:
            assert await store.rows(request) == [None] * len(right)


@asynccontextmanager
async def restarted(server: EmbeddedRedis) -> AsyncIterator[PageStore]:
    server.terminate()
    client = connect(server.start().url)
    yield PageStore(client, ttl_s=600)
    await client.aclose()


def overwrite(server: EmbeddedRedis, values: list[bytes]) -> None:
    """Changes a byte of each value in the server's append-only files, as a bad disk does."""
    assert server.directory is not None
    server.terminate()
    left = {value[: SHAPE.row_bytes] for value in values}
    for path in server.directory.rglob("*.aof"):
        content = bytearray(path.read_bytes())
        for row in list(left):
            place = content.find(row)
            if place >= 0:
                content[place + 3] ^= 0x10
                left.discard(row)
        path.write_bytes(content)
    assert not left


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
    assert await store.size() == (2, 2 * stored_bytes(SHAPE))


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
