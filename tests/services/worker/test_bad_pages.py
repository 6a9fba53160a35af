"""Prompts over a real cache service whose pages are damaged, false or no numbers: they are computed instead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch
from pydantic import SecretStr
from qaq.v1 import common_pb2, originals_pb2_grpc
from qaq.v1 import originals_pb2 as pb
from redis.asyncio import Redis

from qaq_core import OriginalsError, Page, PageShape, page_id
from qaq_core.models import LoadedModel
from services.common import metrics
from services.common.embedded_redis import EmbeddedRedis
from services.common.server import GrpcServer
from services.common.settings import OriginalsSettings
from services.originals import wire
from services.originals.client import RemoteOriginals
from services.originals.seals import Seal
from services.originals.server import OriginalsServer
from services.worker.session import page_salt
from tests.services.metric import value
from tests.services.worker.conftest import EXACT, STORY, MakeScheduler, expected, outcome, request
from tests.shallow import LAYERS

pytestmark = pytest.mark.slow

Ids = Callable[[str], list[int]]
SMALL = {"page_tokens": 16, "prefix_recompute_tokens": 1}
SECRET = "a secret of a deployment"


@pytest.fixture
async def address(redis: Redis, redis_server: EmbeddedRedis) -> AsyncIterator[str]:
    settings = OriginalsSettings(redis_url=SecretStr(redis_server.url), secret=SecretStr(SECRET))
    server = OriginalsServer(settings)
    yield await server.start()
    await server.stop()


async def stored(remote: RemoteOriginals) -> None:
    while remote.pending_bytes:  # noqa: ASYNC110 (a thread sets no asyncio.Event)
        await asyncio.sleep(0.01)


def names(model: LoadedModel, tokens: list[int], tenant: str) -> list[bytes]:
    """The ids of the pages of a text, for who has the secret."""
    pages, salt = [b""], page_salt(SECRET, tenant)
    for start in range(0, len(tokens) // 16 * 16, 16):
        pages.append(page_id(model.identity, "float32", salt, pages[-1], tokens[start : start + 16]))
    return pages[1:]


@pytest.mark.parametrize("damage", ["garbage", "NaN", "another page", "cut off"])
async def test_a_bad_page_is_computed_and_stored_anew(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, redis: Redis, address: str, damage: str
) -> None:
    tokens = ids(STORY * 3)
    whole = (len(tokens) - 1) // 16 * 16
    remote = RemoteOriginals.at([address], secret=SECRET, identity=smollm2.identity)
    loaded = []
    try:
        async with make_scheduler(remote, secret=SECRET, **SMALL) as scheduler:
            shape = scheduler.sessions.methods.get(EXACT).page_shape
            await outcome(scheduler.submit(request(tokens, 1, cache=EXACT, session_id="s", keep=True)))
            await stored(remote)
            pages = names(smollm2, tokens, "")
            keys = [f"qaq:page:{page_id.hex()}" for page_id in pages]
            assert await redis.exists(*keys) == len(keys)
            before = value(metrics.originals_corrupt)
            if damage == "NaN":
                await redis.delete(keys[1])
                page = Page(pages[1], shape, torch.full(shape.dims, torch.nan, dtype=shape.torch_dtype))
                with pytest.raises(OriginalsError, match="holds NaN or infinity and is not stored"):
                    await asyncio.wrap_future(remote.put([page]))
            else:
                raw = await redis.get(keys[1])
                other = await redis.get(keys[0])
                await redis.set(
                    keys[1], {"garbage": raw[:70] + bytes(len(raw) - 70), "cut off": raw[:-8]}.get(damage, other)
                )
            for _ in range(2):
                result = await outcome(scheduler.submit(request(tokens, 4, cache=EXACT)))
                assert result.tokens == expected(smollm2, tokens, 4)
                assert result.done is not None
                loaded.append(result.done.usage.loaded_tokens)
                await stored(remote)
            assert value(metrics.originals_corrupt) > before
    finally:
        remote.close()
    assert loaded == [16, whole]


class Lying(originals_pb2_grpc.OriginalsServicer):
    """A cache service that claims to have everything and answers with what nobody put."""

    async def Put(self, requests: AsyncIterator[pb.PutRequest], context: Any) -> pb.PutReply:
        async for _ in requests:
            pass
        return pb.PutReply(pages_stored=1)

    async def PutCodec(self, requests: AsyncIterator[pb.PutCodecRequest], context: Any) -> pb.PutCodecReply:
        async for _ in requests:
            pass
        return pb.PutCodecReply()

    async def Match(self, request: pb.MatchRequest, context: Any) -> pb.MatchReply:
        return pb.MatchReply(pages=len(request.page_ids))

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.FetchReply]:
        for name in request.page_ids:
            shape = PageShape(LAYERS, 3, 16, 64)
            for chunk in wire.page_chunks(name, shape, Seal(bytes(16), bytes(16)), b"\xff" * shape.nbytes):
                yield pb.FetchReply(chunk=chunk)

    async def Requantize(self, request: pb.RequantizeRequest, context: Any) -> pb.RequantizeReply:
        return pb.RequantizeReply(found=b"\xff" * len(request.side), planes=b"\xff" * 1000)


async def test_a_lying_cache_service_harms_no_worker(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids
) -> None:
    server, tokens = GrpcServer(), ids(STORY * 3)
    server.add("qaq.v1.Originals", originals_pb2_grpc.add_OriginalsServicer_to_server, Lying())
    remote = RemoteOriginals.at([await server.start()], secret=SECRET, identity=smollm2.identity)
    before = value(metrics.originals_corrupt), value(metrics.requantize_failures)
    try:
        async with make_scheduler(remote, secret=SECRET, requantize_wait=True, **SMALL) as scheduler:
            result = await outcome(scheduler.submit(request(tokens, 4, cache=EXACT)))
            assert result.tokens == expected(smollm2, tokens, 4)
            assert result.done is not None
            assert result.done.usage.loaded_tokens == 0
            # This one asks for rows while it decodes.
            result = await outcome(scheduler.submit(request(tokens, 40, cache=common_pb2.CacheParams(target_bits=3.0))))
            assert len(result.tokens) == 40
    finally:
        remote.close()
        await server.stop(0)
    assert value(metrics.originals_corrupt) > before[0]
    assert value(metrics.requantize_failures) > before[1], "rows were asked for"


async def test_without_the_secret_nobody_finds_or_forges_a_page(
    smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids, redis: Redis, address: str
) -> None:
    """An attacker at the cache service's port, who knows model, text and tenant."""
    tokens = ids(STORY * 3)
    remotes = [RemoteOriginals.at([address], secret=one, identity=smollm2.identity) for one in (SECRET, "")]
    try:
        async with (
            make_scheduler(remotes[0], secret=SECRET, **SMALL) as worker,
            make_scheduler(remotes[1], **SMALL) as attacker,
        ):
            await outcome(worker.submit(request(tokens, 1, cache=EXACT, tenant="t", session_id="s", keep=True)))
            await stored(remotes[0])
            guessed = await outcome(attacker.submit(request(tokens, 1, cache=EXACT, tenant="t", session_id="s")))
            assert guessed.done is not None
            assert guessed.done.usage.loaded_tokens == 0
            pages, shape = names(smollm2, tokens, "t"), worker.sessions.methods.get(EXACT).page_shape
            assert await asyncio.wrap_future(remotes[0].match(pages)) == len(pages)
            assert len(await redis.keys("qaq:page:*")) == len(pages), "nothing of the attacker's is stored"
            false = Page(bytes(32), shape, torch.zeros(shape.dims, dtype=shape.torch_dtype))
            with pytest.raises(OriginalsError, match="PERMISSION_DENIED"):
                await asyncio.wrap_future(remotes[1].put([false]))
            again = await outcome(worker.submit(request(tokens, 1, cache=EXACT, tenant="t")))
            assert again.done is not None
            assert again.done.usage.loaded_tokens == (len(tokens) - 1) // 16 * 16
    finally:
        for remote in remotes:
            remote.close()
