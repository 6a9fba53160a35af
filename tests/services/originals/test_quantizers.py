"""The quantizers that a cache service keeps, and what it does with damaged ones."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pydantic import SecretStr
from redis.asyncio import Redis

from qaq_core.base.errors import OriginalsError
from qaq_core.base.rows import RowReply, RowRequest
from qaq_core.kernels import NativeEncoder, load_library
from qaq_core.quantization.codecs import ProgressiveCodec
from qaq_core.quantization.quantizer import Quantizer
from services.common.embedded_redis import EmbeddedRedis
from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.settings import OriginalsSettings
from services.originals import quantizers
from services.originals.client import RemoteOriginals
from services.originals.quantizers import Quantizers
from services.originals.server import OriginalsServer
from services.originals.store import PageStore
from tests.services.originals.conftest import make_pages, make_request


@pytest.fixture
async def kept(redis: Redis) -> AsyncIterator[Quantizers]:
    with ThreadPoolExecutor(1) as threads:
        yield Quantizers(PageStore(redis, ttl_s=60), threads)


@pytest.mark.skipif(load_library() is None, reason="the C++ library is not built")
async def test_rows_are_encoded_in_cpp(kept: Quantizers, quantizer: Quantizer) -> None:
    parsed = await kept.parse(quantizer.to_bytes())
    assert isinstance(parsed.encoder(torch.device("cpu")), NativeEncoder)


async def test_one_that_is_not_stored_as_it_was_put_is_asked_for_again(
    kept: Quantizers, redis: Redis, quantizer: Quantizer
) -> None:
    tables = quantizer.to_bytes()
    other = quantizer.centered_on(torch.ones(3, 2, 2, 64, 16), 0)
    for stored in (None, b"", tables[:-3], bytes(100), tables[:-1] + bytes([tables[-1] ^ 1])):
        if stored is not None:
            await redis.set(f"qaq:codec:{quantizer.id.hex()}", stored)
        with pytest.raises(FailedPrecondition, match="call PutCodec"):
            await kept.get(quantizer.id)
        with pytest.raises(FailedPrecondition, match="call PutCodec"):
            await kept.parse(other.to_bytes())
    await redis.set(f"qaq:codec:{quantizer.id.hex()}", tables)
    assert (await kept.get(quantizer.id)).id == quantizer.id
    assert (await kept.parse(other.to_bytes())).id == other.id


async def test_tables_of_nothing_are_refused(kept: Quantizers) -> None:
    with pytest.raises(InvalidArgument, match="not a quantizer"):
        await kept.parse(b"nothing")


async def test_a_worker_replaces_a_damaged_one(redis: Redis, redis_server: EmbeddedRedis, quantizer: Quantizer) -> None:
    settings = OriginalsSettings(redis_url=SecretStr(redis_server.url))
    first, second = OriginalsServer(settings), OriginalsServer(settings)
    addresses = [await first.start()]
    remote = RemoteOriginals(lambda: asyncio.sleep(0, addresses))
    try:
        pages = make_pages(2)
        await asyncio.wrap_future(remote.put(pages))
        rows = make_request(pages, 20, quantizer.meta_bytes)
        before = await asyncio.wrap_future(remote.requantize(rows, quantizer))
        # The worker has put it; this service, which has never seen it, finds something else in Redis.
        await redis.set(f"qaq:codec:{quantizer.id.hex()}", b"damaged")
        addresses[:] = [await second.start()]
        await first.stop()
        async with asyncio.timeout(30):
            while (after := await answered(remote, rows, quantizer)) is None:  # noqa: ASYNC110 (it finds the other one)
                await asyncio.sleep(0.1)
        assert np.array_equal(after.planes, before.planes)
        assert await redis.get(f"qaq:codec:{quantizer.id.hex()}") == quantizer.to_bytes()
    finally:
        remote.close()
        await second.stop()


async def test_what_is_kept_is_bounded_by_bytes(
    kept: Quantizers, redis: Redis, quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models, and with them the quantizers of sequences, which would keep their bases."""
    size = len(quantizer.to_bytes())
    monkeypatch.setattr(quantizers, "_OF_MODELS_BYTES", 3 * size)
    orders = [[0] * n + [1] + [0] * (8 - n) + [1] * 7 for n in range(6)]
    models = [Quantizer(quantizer.transform, ProgressiveCodec([order, [0, 1] * 8])) for order in orders]
    sequences = [model.centered_on(torch.ones(3, 2, 2, 64, 16), 0) for model in models]
    for one in [*models, *sequences]:
        await redis.set(f"qaq:codec:{one.id.hex()}", one.to_bytes())
    for one in sequences:
        await kept.get(one.id)
        await kept.get(sequences[0].id)  # what is used stays
    assert sum(len(one.to_bytes()) for one in kept._of_models.values()) <= 3 * size
    assert {one.base.id for one in kept._of_sequences.values()} <= set(kept._of_models)
    assert models[0].id in kept._of_models
    assert set(kept._sizes) == {*kept._of_models, *kept._of_sequences}


async def answered(remote: RemoteOriginals, rows: RowRequest, quantizer: Quantizer) -> RowReply | None:
    with contextlib.suppress(OriginalsError):
        return await asyncio.wrap_future(remote.requantize(rows, quantizer))
    return None
