"""Records what this version of QAQ writes to Redis, for the test that later versions can read it:

    python -m tools.record_store tests/services/upgrades/store_1.json

A release that changes what is stored records another file and keeps the ones that are there.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import torch
from qaq.v1 import common_pb2, worker_pb2
from redis.asyncio import Redis

from qaq_core.base.pages import Page, PageShape, page_id
from qaq_core.quantization.codecs import ProgressiveCodec
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import LinearTransform
from services.common.embedded_redis import EmbeddedRedis
from services.common.redis import connect
from services.common.registry import Registry
from services.originals.page_forms import PageForm
from services.originals.seals import Seals
from services.originals.store import PageStore
from services.router.sessions import SessionDirectory

SECRET, MODEL = "a secret of recorded stores", "a model"
SHAPE = PageShape(layers=2, kv_heads=2, tokens=4, head_dim=16)
FORMS: tuple[PageForm, ...] = ("plain", "lossless", "float16", "int8")
LOG = [1, 2, 3, 500]

Record = dict[str, Any]


async def record(redis: Redis) -> Record:
    """Writes one of everything. Returns all keys, and what they say."""
    pages = _pages()
    for form, page in zip(FORMS, pages, strict=True):
        store = PageStore(redis, 3600, SECRET, form=form)
        seal = Seals(SECRET, MODEL).make(page.id, page.shape, page.to_bytes())
        await store.put(page.id, page.shape, seal, page.to_bytes())
    quantizer = _quantizer()
    await store.put_codec(quantizer.id, quantizer.to_bytes())
    directory = SessionDirectory(redis, 3600)
    params = common_pb2.CacheParams(preset="balanced", target_bits=2.5)
    session = await directory.open("m", params, kept=True, tenant="t")
    async with directory.held(session.id, lambda _: None, tenant="t") as hold:
        await hold.write_turn(worker_pb2.RunRequest(session_id=session.id, token_ids=LOG[:2], tenant="t"))
        await hold.write(0, LOG)
        await hold.write_pages([pages[0].id], SHAPE.tokens)
    async with Registry(redis).announce("worker", "10.0.0.1:7710", {"pid": 1, "model": "m"}):
        keys = {key.decode(): await _value(redis, key) for key in sorted(await redis.keys("*"))}
    told = {
        "pages": {form: [page.id.hex(), _text(page.to_bytes())] for form, page in zip(FORMS, pages, strict=True)},
        "codec": quantizer.id.hex(),
        "session": session.id,
        "log": LOG,
    }
    return {"keys": keys, "told": told}


async def restore(redis: Redis, keys: dict[str, list[Any]]) -> None:
    """Writes recorded keys."""
    for key, (kind, value) in keys.items():
        if kind == "string":
            await redis.set(key, base64.b64decode(value))
        elif kind == "hash":
            await redis.hset(key, mapping={base64.b64decode(k): base64.b64decode(v) for k, v in value})
        elif kind == "zset":
            await redis.zadd(key, {base64.b64decode(member): score for member, score in value})
        else:
            await redis.sadd(key, *(base64.b64decode(member) for member in value))


async def _value(redis: Any, key: bytes) -> list[Any]:
    kind = (await redis.type(key)).decode()
    if kind == "string":
        return [kind, _text(await redis.get(key))]
    if kind == "hash":
        return [kind, sorted([_text(field), _text(value)] for field, value in (await redis.hgetall(key)).items())]
    if kind == "zset":
        return [kind, [[_text(member), score] for member, score in await redis.zrange(key, 0, -1, withscores=True)]]
    return [kind, sorted(_text(member) for member in await redis.smembers(key))]


def _text(value: bytes | memoryview) -> str:
    return base64.b64encode(bytes(value)).decode()


def _pages() -> list[Page]:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(SHAPE.dims, generator=generator) for _ in FORMS]
    return [Page(page_id(MODEL, SHAPE.dtype, b"", b"", [place]), SHAPE, each) for place, each in enumerate(data)]


def _quantizer() -> Quantizer:
    """Of the balanced preset's kind, for the pages' shape."""
    heads, size = (2, SHAPE.layers, SHAPE.kv_heads), SHAPE.head_dim
    means, matrices = torch.zeros(*heads, size), torch.eye(size).expand(*heads, size, size).half().contiguous()
    frequencies = 10_000.0 ** -(torch.arange(size // 2, dtype=torch.float64) / (size // 2))
    kind = torch.zeros(SHAPE.layers, dtype=torch.long)
    frame = LinearTransform(matrices[0], matrices[1], means[0], means[1], frequencies[None], kind)
    return Quantizer(frame, ProgressiveCodec([[0] * 3 + [1, 0] * 5 + [1] * 3, [0, 1] * 8]))


async def _recorded() -> str:
    with EmbeddedRedis() as server:
        redis = connect(server.url)
        recorded = await record(redis)
        await redis.aclose()
    return json.dumps(recorded, indent=1) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(asyncio.run(_recorded()))
