"""The Originals service over gRPC: its answers and its refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from pydantic import SecretStr
from qaq.v1 import originals_pb2 as pb
from qaq.v1 import originals_pb2_grpc
from redis.asyncio import Redis

from qaq_core.base.pages import Page, PageShape
from qaq_core.quantization.quantizer import Quantizer
from services.common import metrics
from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import OriginalsSettings
from services.originals import wire
from services.originals.page_format import PageFormat
from services.originals.server import OriginalsServer
from services.originals.store import PageStore
from tests.services.metric import value
from tests.services.originals.conftest import SHAPE, getranges, make_pages, make_request, seal, status

Code = grpc.StatusCode
Stub = originals_pb2_grpc.OriginalsStub
ID = bytes(range(32))


async def chunks(*pages: Page) -> AsyncIterator[pb.PutRequest]:
    for page in pages:
        for piece in wire.page_chunks(page.id, page.shape, seal(page), page.to_bytes()):
            yield pb.PutRequest(chunk=piece)


async def messages(*pieces: pb.PageChunk) -> AsyncIterator[pb.PutRequest]:
    for piece in pieces:
        yield pb.PutRequest(chunk=piece)


async def put_codec(stub: Stub, quantizer: Quantizer) -> None:
    await stub.PutCodec(iter(wire.codec_chunks(quantizer.id, quantizer.to_bytes())), timeout=10)


async def test_put_answers_when_redis_has_the_pages(stub: Stub, redis: Redis) -> None:
    pages = make_pages(3)
    reply = await stub.Put(chunks(*pages), timeout=10)
    assert (reply.pages_stored, reply.pages_known) == (3, 0)
    assert await redis.exists(*(f"qaq:page:{page.id.hex()}" for page in pages)) == 3
    reply = await stub.Put(chunks(*pages[:2], *make_pages(1, seed=9)), timeout=10)
    assert (reply.pages_stored, reply.pages_known) == (1, 2)
    assert (await stub.Match(pb.MatchRequest(page_ids=[p.id for p in pages]), timeout=10)).pages == 3


async def test_a_large_page_is_sent_in_chunks(stub: Stub) -> None:
    (page,) = make_pages(1, PageShape(layers=20, kv_heads=4, tokens=32, head_dim=128))
    assert page.shape.nbytes > 2 * wire.CHUNK_BYTES
    await stub.Put(chunks(page), timeout=10)
    replies = [r.chunk async for r in stub.Fetch(pb.FetchRequest(page_ids=[ID, page.id]), timeout=10)]
    assert (replies[0].page_id, replies[0].missing, replies[0].last) == (ID, True, True)
    assert len(replies) > 3
    assert all(len(chunk.data) <= wire.CHUNK_BYTES for chunk in replies)
    assert b"".join(chunk.data for chunk in replies) == bytes(page.to_bytes())


def piece(
    data: bytes = bytes(SHAPE.nbytes), last: bool = True, page_id: bytes = ID, mac: bytes = bytes(16), **shape: Any
) -> pb.PageChunk:
    facts = wire.shape_message(dataclasses.replace(SHAPE, **shape))
    return pb.PageChunk(page_id=page_id, shape=facts, model=bytes(16), mac=mac, data=data, last=last)


BAD_PUTS = {
    "short id": ([piece(page_id=b"short")], "must have 32"),
    "no shape": ([pb.PageChunk(page_id=ID, data=b"x", last=True)], "must carry its shape"),
    "no seal": ([piece(mac=b"")], "mac has 0 bytes and must have 16"),
    "dtype": ([piece(dtype="int8")], "float32, float16, bfloat16"),
    "no layers": ([piece(layers=0)], "shape.layers is 0"),
    "negative": ([piece(tokens=-1)], "shape.tokens is -1"),
    "odd dim": ([piece(head_dim=12)], "multiple of 16"),
    "huge": ([piece(layers=30_000, head_dim=1024)], "fewer page_tokens"),
    "too few bytes": ([piece(bytes(8))], "its shape says 3,072"),
    "too many bytes": ([piece(last=False), piece(b"x")], "its shape says 3,072"),
    "cut off": ([piece(bytes(8), last=False)], "ended inside a page"),
    "mixed": ([piece(bytes(8), last=False), piece(page_id=bytes(32))], "before the previous one was complete"),
    "large piece": ([piece(bytes(wire.CHUNK_BYTES + 1))], "at most 1,048,576"),
}


@pytest.mark.parametrize("name", BAD_PUTS)
async def test_bad_puts(stub: Stub, redis: Redis, name: str) -> None:
    pieces, said = BAD_PUTS[name]
    code, message = await status(stub.Put(messages(*pieces), timeout=10))
    assert code is Code.INVALID_ARGUMENT
    assert said in message
    assert await redis.keys("qaq:page:*") == []


async def test_a_page_that_is_not_sealed_with_the_secret_is_refused(stub: Stub, redis: Redis) -> None:
    """By content, id, shape and secret; so whoever reaches the port cannot put a false page first."""
    page, other = make_pages(2)
    own = seal(page)
    for page_id, shape, mark, data in (
        (page.id, page.shape, own, other.to_bytes()),
        (other.id, page.shape, own, page.to_bytes()),
        (page.id, dataclasses.replace(SHAPE, dtype="float16", tokens=8), own, page.to_bytes()),
        (page.id, page.shape, own._replace(model=bytes(16)), page.to_bytes()),
        (page.id, page.shape, seal(page, secret="another one, of an attacker"), page.to_bytes()),
    ):
        pieces = list(wire.page_chunks(page_id, shape, mark, data))
        code, message = await status(stub.Put(messages(*pieces), timeout=10))
        assert code is Code.PERMISSION_DENIED
        assert "the same QAQ_SECRET" in message
    assert await redis.keys("qaq:page:*") == []
    assert (await stub.Put(chunks(page), timeout=10)).pages_stored == 1


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
async def test_a_page_that_is_no_numbers_is_not_stored(stub: Stub, redis: Redis, wrong: float, dtype: str) -> None:
    (page,) = make_pages(1, dataclasses.replace(SHAPE, dtype=dtype))
    page.data[2, 1, 0, 3, 5] = wrong
    before = value(metrics.originals_corrupt)
    code, message = await status(stub.Put(chunks(page), timeout=10))
    assert code is Code.INVALID_ARGUMENT
    assert "holds NaN or infinity and is not stored" in message
    assert value(metrics.originals_corrupt) == before + 1
    assert await redis.keys("qaq:page:*") == []


async def test_a_false_page_does_not_keep_the_right_one_out(stub: Stub, redis: Redis) -> None:
    """Written to Redis itself, by somebody without the secret: garbage, another page, and one cut off."""
    page, other = make_pages(2)
    await stub.Put(chunks(page, other), timeout=10)
    own, key = await redis.get(f"qaq:page:{page.id.hex()}"), f"qaq:page:{page.id.hex()}"
    forged = bytes(PageFormat("the secret of an attacker").pack(page.id, SHAPE, seal(page), page.to_bytes()))
    for false in (
        b"",
        b"x",
        bytes(len(own)),
        await redis.get(f"qaq:page:{other.id.hex()}"),
        forged,
        own[:-1],
        own + b"x",
    ):
        await redis.set(key, false, ex=5)
        reply = await stub.Put(chunks(page), timeout=10)
        assert (reply.pages_stored, reply.pages_known) == (1, 0)
        assert await redis.get(key) == own
        assert await redis.ttl(key) > 1000
    assert (await stub.Put(chunks(page), timeout=10)).pages_known == 1


async def test_rows_without_numbers_are_missing(stub: Stub, redis: Redis, quantizer: Quantizer) -> None:
    """A page of NaN, which stands in Redis from earlier, fails no batch."""
    pages = make_pages(3)
    pages[1].data[:, :, 1] = torch.nan
    pages[2].data[0] = torch.inf
    store = PageStore(redis, ttl_s=60)
    for page in pages:
        await store.put(page.id, page.shape, seal(page), page.to_bytes())
    await put_codec(stub, quantizer)
    rows = make_request(pages, 200, 1)
    reply = await stub.Requantize(wire.row_request_message(rows, quantizer.id), timeout=10)
    bad = ((rows.page == 1) & (rows.head == 1)) | ((rows.page == 2) & (rows.layer == 0))
    assert 0 < bad.sum() < 200
    assert list(reply.found) == (~bad).tolist()
    assert len(reply.planes) == rows.payload_bytes()[~bad].sum()
    assert await redis.keys("qaq:page:*") == [f"qaq:page:{pages[0].id.hex()}".encode()], "the others can be put again"


async def test_rows_beyond_every_codec_fail_no_service(stub: Stub, redis: Redis, quantizer: Quantizer) -> None:
    """The largest numbers of a dtype are numbers; the rows that they give are clipped or refused."""
    (page,) = make_pages(1)
    page.data[:] = torch.finfo(torch.float32).max
    await stub.Put(chunks(page), timeout=10)
    await put_codec(stub, quantizer)
    rows = wire.row_request_message(make_request([page], 50, 1), quantizer.id)
    reply = await stub.Requantize(rows, timeout=10)
    assert len(reply.found) == 50


async def test_bad_codecs(stub: Stub, quantizer: Quantizer) -> None:
    tables = quantizer.to_bytes()
    for codec_id, raw, said in (
        (b"short", tables, "must have 16"),
        (bytes(16), tables, "not the fingerprint"),
        (quantizer.id, tables[:-5], "not a quantizer"),
        (quantizer.id, b"", "not a quantizer"),
    ):
        code, message = await status(stub.PutCodec(iter(wire.codec_chunks(codec_id, raw)), timeout=10))
        assert code is Code.INVALID_ARGUMENT
        assert said in message


async def test_a_quantizer_without_its_base(stub: Stub, quantizer: Quantizer) -> None:
    own = quantizer.centered_on(torch.ones(SHAPE.layers, 2, SHAPE.kv_heads, 70, SHAPE.head_dim), 0)
    pieces = wire.codec_chunks(own.id, own.to_bytes())
    code, message = await status(stub.PutCodec(iter(pieces), timeout=10))
    assert code is Code.FAILED_PRECONDITION
    assert quantizer.id.hex() in message


async def test_a_codec_in_chunks(stub: Stub, redis: Redis, quantizer: Quantizer) -> None:
    tables = quantizer.to_bytes()
    pieces = [
        pb.PutCodecRequest(codec_id=quantizer.id, tables=tables[i : i + 1000]) for i in range(0, len(tables), 1000)
    ]
    assert len(pieces) > 1
    await stub.PutCodec(iter(pieces), timeout=10)
    assert await redis.keys(f"qaq:codec:{quantizer.id.hex()}")
    other = pb.PutCodecRequest(codec_id=bytes(16), tables=b"")
    code, message = await status(stub.PutCodec(iter([pieces[0], other]), timeout=10))
    assert code is Code.INVALID_ARGUMENT
    assert "two codecs" in message


async def test_an_unknown_codec(stub: Stub, quantizer: Quantizer) -> None:
    request = wire.row_request_message(make_request(make_pages(1), 2, 1), quantizer.id)
    code, message = await status(stub.Requantize(request, timeout=10))
    assert code is Code.FAILED_PRECONDITION
    assert "call PutCodec first" in message


BAD_ROWS = {
    "layer": ("layer", np.array([0, 3], "<i2"), "layer must be"),
    "head": ("head", np.array([2, 0], "<i2"), "head must be"),
    "side": ("side", np.array([0, 2], "u1"), "side must be"),
    "negative position": ("position", np.array([0, -1], "<i4"), "position must be"),
    "position": ("position", np.array([0, 1 << 21], "<i4"), "position must be below 1,048,576"),
    "page": ("position", np.array([0, SHAPE.tokens], "<i4"), "page 1 has rows and no id"),
    "have": ("have", np.array([0, 33], "u1"), "have must be"),
    "have that is no width": ("have", np.array([0, 9], "u1"), "have must be"),
    "want": ("want", np.array([9, 16], "u1"), "want must be"),
    "want beyond half precision": ("want", np.array([33, 16], "u1"), "want must be"),
    "nothing wanted": ("want", np.array([0, 16], "u1"), "want must be above have"),
    "length": ("layer", np.array([0], "<i2"), "layer has 2 bytes"),
    "meta": ("meta", np.array([0], "u1"), "meta has 1 bytes"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
async def test_bad_rows(stub: Stub, quantizer: Quantizer, name: str) -> None:
    await put_codec(stub, quantizer)
    request = wire.row_request_message(make_request(make_pages(1), 2, 1), quantizer.id)
    field, value, said = BAD_ROWS[name]
    setattr(request, field, value.tobytes())
    code, message = await status(stub.Requantize(request, timeout=10))
    assert code is Code.INVALID_ARGUMENT
    assert said in message


@pytest.mark.parametrize(
    ("pages", "said"),
    [
        ({}, "page 0 has rows and no id"),
        ({0: ID, 1: ID}, "page 1 has an id and no rows"),
        ({0: ID, -1: ID}, "page -1 has an id and no rows"),
        ({0: b"short"}, "must have 32"),
    ],
)
async def test_bad_pages_of_rows(stub: Stub, quantizer: Quantizer, pages: dict[int, bytes], said: str) -> None:
    await put_codec(stub, quantizer)
    request = wire.row_request_message(make_request(make_pages(1), 2, 1), quantizer.id)
    request.page_ids.clear()
    request.page_ids.update(pages)
    code, message = await status(stub.Requantize(request, timeout=10))
    assert code is Code.INVALID_ARGUMENT
    assert said in message


async def test_too_many_rows(stub: Stub, quantizer: Quantizer) -> None:
    await put_codec(stub, quantizer)
    request = wire.row_request_message(make_request(make_pages(1), wire.MAX_ROWS + 1, 1), quantizer.id)
    code, message = await status(stub.Requantize(request, timeout=10))
    assert code is Code.INVALID_ARGUMENT
    assert "split it" in message


async def test_tables_of_another_model(stub: Stub, quantizer: Quantizer) -> None:
    """The pages have more layers than the codec's tables."""
    pages = make_pages(1, dataclasses.replace(SHAPE, layers=9))
    await stub.Put(chunks(*pages), timeout=10)
    await put_codec(stub, quantizer)
    rows = dataclasses.replace(make_request(pages, 2, 1), layer=np.array([8, 8], "<i2"))
    code, message = await status(stub.Requantize(wire.row_request_message(rows, quantizer.id), timeout=10))
    assert code is Code.INVALID_ARGUMENT
    assert "do not fit" in message


async def test_stats_count_what_redis_counts(stub: Stub, redis: Redis, quantizer: Quantizer) -> None:
    pages = make_pages(3)
    await stub.Put(chunks(*pages[:2]), timeout=10)
    await put_codec(stub, quantizer)
    rows = make_request(pages, 50, 1)
    before = await getranges(redis)
    reply = await stub.Requantize(wire.row_request_message(rows, quantizer.id), timeout=10)
    there = int((rows.page < 2).sum())
    assert 0 < there < 50
    places = zip(rows.page.tolist(), (rows.offset // SHAPE.row_bytes).tolist(), strict=True)
    places_there = {(page, place) for page, place in places if page < 2}
    assert await getranges(redis) == before + len(places_there) + len(pages)  # one header a page
    stats = await stub.Stats(pb.StatsRequest(), timeout=10)
    assert stats.pages == 2
    assert stats.bytes == sum([await redis.strlen(key) for key in await redis.keys("qaq:page:*")])
    assert (stats.rows_requantized, stats.rows_missing, stats.redis_row_reads) == (there, 50 - there, there)
    assert stats.requantize_bytes == len(reply.planes) > 0


async def test_touch(stub: Stub, redis: Redis) -> None:
    (page,) = make_pages(1)
    await stub.Put(chunks(page), timeout=10)
    await redis.expire(f"qaq:page:{page.id.hex()}", 5)
    assert (await stub.Touch(pb.TouchRequest(page_ids=[page.id, ID]), timeout=10)).pages == 1
    assert await redis.ttl(f"qaq:page:{page.id.hex()}") > 1000


async def test_a_full_and_then_a_stopped_redis() -> None:
    pages = make_pages(3, PageShape(layers=8, kv_heads=4, tokens=32, head_dim=128))
    with EmbeddedRedis(maxmemory="3mb") as redis_server:
        server = OriginalsServer(OriginalsSettings(redis_url=SecretStr(redis_server.url)))
        async with open_channel(await server.start()) as channel:
            stub = Stub(channel)
            code, message = await status(stub.Put(chunks(*pages), timeout=10))
            assert code is Code.RESOURCE_EXHAUSTED
            assert "maxmemory" in message
            redis_server.terminate()
            code, message = await status(stub.Match(pb.MatchRequest(page_ids=[ID]), timeout=30))
            assert code is Code.UNAVAILABLE
            assert "Redis does not answer" in message
        await server.stop()
