"""A cache service over the real Redis, and things to put in it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import grpc
import numpy as np
import pytest
import torch
from pydantic import SecretStr
from qaq.v1 import originals_pb2_grpc
from redis.asyncio import Redis

from qaq_core.base.pages import Page, PageShape, page_id
from qaq_core.base.rows import RowRequest
from qaq_core.base.widths import WIDTHS
from qaq_core.quantization.codecs import ProgressiveCodec
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import LinearTransform
from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import OriginalsSettings
from services.originals.client import RemoteOriginals
from services.originals.seals import Seal, Seals
from services.originals.server import OriginalsServer

SHAPE = PageShape(layers=3, kv_heads=2, tokens=4, head_dim=16)


def make_pages(count: int, shape: PageShape = SHAPE, seed: int = 0) -> list[Page]:
    """A chain of pages of random values."""
    generator = torch.Generator().manual_seed(seed)
    pages: list[Page] = []
    for i in range(count):
        parent = pages[-1].id if pages else b""
        data = torch.randn(shape.dims, generator=generator).to(shape.torch_dtype)
        pages.append(Page(page_id("model", shape.dtype, b"", parent, [seed, i]), shape, data))
    return pages


def seal(page: Page, secret: str = "", model: str = "") -> Seal:
    """The seal of a worker that serves that model."""
    return Seals(secret, model).make(page.id, page.shape, page.to_bytes())


def make_request(pages: list[Page], rows: int, meta_bytes: int, seed: int = 0) -> RowRequest:
    """Random rows of pages, every width among them."""
    random, shape = np.random.default_rng(seed), pages[0].shape
    lower = random.integers(0, len(WIDTHS) - 1, rows)
    have, want = (np.array(WIDTHS, np.uint8)[i] for i in (lower, random.integers(lower + 1, len(WIDTHS))))
    position = random.integers(0, len(pages) * shape.tokens, rows).astype(np.int32)
    page = position // shape.tokens
    return RowRequest(
        shape=shape,
        page_ids={number: pages[number].id for number in np.unique(page).tolist()},
        layer=random.integers(0, shape.layers, rows).astype(np.int16),
        head=random.integers(0, shape.kv_heads, rows).astype(np.int16),
        position=position,
        side=random.integers(0, 2, rows).astype(np.uint8),
        have=have,
        want=want,
        meta=_meta(random, rows, meta_bytes),
    )


def _meta(random: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Meta bytes as codecs make them: an offset and a scale in half precision, or codes of scales."""
    if size == 4:
        return random.uniform(0.25, 2.0, (rows, 2)).astype(np.float16).view(np.uint8)
    return random.integers(100, 180, (rows, size)).astype(np.uint8)


@pytest.fixture(scope="session")
def quantizer() -> Quantizer:
    """The frame and codec of the balanced preset, with random tables."""
    generator = torch.Generator().manual_seed(1)
    heads = (2, SHAPE.layers, SHAPE.kv_heads)
    means = torch.randn(*heads, SHAPE.head_dim, generator=generator)
    matrices = torch.randn(*heads, SHAPE.head_dim, SHAPE.head_dim, generator=generator) / 4
    matrices = (matrices + 2 * torch.eye(SHAPE.head_dim)).half()
    frequencies = 10_000.0 ** -(torch.arange(SHAPE.head_dim // 2, dtype=torch.float64) / (SHAPE.head_dim // 2))
    kind = torch.zeros(SHAPE.layers, dtype=torch.long)
    frame = LinearTransform(matrices[0], matrices[1], means[0], means[1], frequencies[None], kind)
    return Quantizer(frame, ProgressiveCodec([[0] * 3 + [1, 0] * 5 + [1] * 3, [0, 1] * 8]))


@pytest.fixture
async def server(redis: Redis, redis_server: EmbeddedRedis) -> AsyncIterator[OriginalsServer]:
    server = OriginalsServer(OriginalsSettings(redis_url=SecretStr(redis_server.url)))
    yield server
    await server.stop()


@pytest.fixture
async def address(server: OriginalsServer) -> str:
    return await server.start()


@pytest.fixture
async def stub(address: str) -> AsyncIterator[originals_pb2_grpc.OriginalsStub]:
    async with open_channel(address) as channel:
        yield originals_pb2_grpc.OriginalsStub(channel)


@pytest.fixture
def remote(address: str) -> Iterator[RemoteOriginals]:
    remote = RemoteOriginals.at([address])
    yield remote
    remote.close()


async def status(call: object) -> tuple[grpc.StatusCode, str]:
    """Code and message that a call fails with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), caught.value.details() or ""


async def getranges(redis: Redis) -> int:
    """How many GETRANGE commands the Redis server itself has counted."""
    return int((await redis.info("commandstats")).get("cmdstat_getrange", {"calls": 0})["calls"])
