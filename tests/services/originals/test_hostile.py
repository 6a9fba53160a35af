"""A cache service that answers anything: the worker's side uses nothing of it that is not right."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
import torch
from qaq.v1 import originals_pb2 as pb
from qaq.v1 import originals_pb2_grpc

from qaq_core.base.errors import OriginalsError
from qaq_core.base.pages import Page, PageShape
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.storage.originals import InProcessOriginals
from services.common import metrics
from services.common.server import GrpcServer
from services.originals import wire
from services.originals.client import RemoteOriginals
from services.originals.seals import Seal
from tests.services.metric import value
from tests.services.originals.conftest import SHAPE, make_pages, make_request, seal

T = TypeVar("T")
SECRET, MODEL = "a secret of a deployment", "the model"


class Hostile(originals_pb2_grpc.OriginalsServicer):
    """Answers what it is told to.

    Attributes:
        answer: the reply of every call, or the replies of Fetch.
    """

    answer: Any = None

    async def Match(self, request: pb.MatchRequest, context: Any) -> pb.MatchReply:
        return self.answer

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.FetchReply]:
        for chunk in self.answer:
            yield pb.FetchReply(chunk=chunk)

    async def PutCodec(self, requests: AsyncIterator[pb.PutCodecRequest], context: Any) -> pb.PutCodecReply:
        return pb.PutCodecReply()

    async def Requantize(self, request: pb.RequantizeRequest, context: Any) -> pb.RequantizeReply:
        return self.answer


@pytest.fixture
async def hostile() -> AsyncIterator[tuple[Hostile, RemoteOriginals]]:
    service, server = Hostile(), GrpcServer()
    server.add("qaq.v1.Originals", originals_pb2_grpc.add_OriginalsServicer_to_server, service)
    remote = RemoteOriginals.at([await server.start()], secret=SECRET, identity=MODEL)
    yield service, remote
    await asyncio.to_thread(remote.close)
    await server.stop(0)


class Noise(grpc.GenericRpcHandler):
    """Answers every call with bytes that are no message."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def one(request: bytes, context: Any) -> bytes:
            return b"\xff\xff\xff"

        async def some(request: bytes, context: Any) -> AsyncIterator[bytes]:
            yield b"\xff\xff\xff"

        streams = details.method.endswith("/Fetch")
        return grpc.unary_stream_rpc_method_handler(some) if streams else grpc.unary_unary_rpc_method_handler(one)


async def test_bytes_that_are_no_message_fail(quantizer: Quantizer) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Noise(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    remote = RemoteOriginals.at([f"127.0.0.1:{port}"])
    request = make_request([PAGE, NEXT], 9, quantizer.meta_bytes)
    try:
        for call in (
            remote.match([PAGE.id]),
            remote.fetch([PAGE.id], SHAPE),
            remote.requantize(request, quantizer),
        ):
            with pytest.raises(OriginalsError):
                await wait(call)
    finally:
        await asyncio.to_thread(remote.close)
        await server.stop(0)


async def wait(future: Future[T]) -> T:
    return await asyncio.wait_for(asyncio.wrap_future(future), 30)


PAGE, NEXT, STRANGER = make_pages(3)


def chunks(page: Page, mark: Seal | None = None, **changes: Any) -> list[pb.PageChunk]:
    facts = {"shape": page.shape, "data": page.to_bytes(), "page_id": page.id, **changes}
    mark = mark or seal(dataclasses.replace(page, id=facts["page_id"]), SECRET, MODEL)
    return list(wire.page_chunks(facts["page_id"], facts["shape"], mark, facts["data"]))


def changed(page: Page, **fields: Any) -> list[pb.PageChunk]:
    (chunk,) = chunks(page)
    for name in fields:
        chunk.ClearField(name)
    chunk.MergeFrom(pb.PageChunk(**fields))
    return [chunk]


def filled(number: float) -> Page:
    data = PAGE.data.clone()
    data[2, 1, 0, 3, 5] = number
    return dataclasses.replace(PAGE, data=data)


def missing(page: Page) -> pb.PageChunk:
    return pb.PageChunk(page_id=page.id, last=True, missing=True)


BROKEN: dict[str, Iterable[pb.PageChunk]] = {
    "nothing": [],
    "one of two": chunks(PAGE),
    "not asked for": [*chunks(PAGE), *chunks(STRANGER)],
    "another order": [*chunks(NEXT), *chunks(PAGE)],
    "the same twice": [*chunks(PAGE), *chunks(PAGE)],
    "one too many": [*chunks(PAGE), *chunks(NEXT), *chunks(STRANGER)],
    "one too many is missing": [*chunks(PAGE), *chunks(NEXT), missing(NEXT)],
    "no id": changed(PAGE, page_id=b""),
    "no shape": changed(PAGE, shape=None),
    "a shape of nothing": changed(PAGE, shape=pb.PageShape(dtype="float32")),
    "a huge shape": changed(PAGE, shape=wire.shape_message(PageShape(30_000, 30_000, 30_000, 16))),
    "a negative shape": changed(PAGE, shape=wire.shape_message(PageShape(-3, -2, 4, 16))),
    "another shape": chunks(make_pages(1, PageShape(3, 2, 8, 16))[0], page_id=PAGE.id),
    "another dtype": chunks(PAGE, shape=dataclasses.replace(SHAPE, dtype="bfloat16", tokens=8)),
    "no dtype": changed(PAGE, shape=wire.shape_message(dataclasses.replace(SHAPE, dtype="int4"))),
    "no seal": changed(PAGE, mac=b""),
    "a short seal": changed(PAGE, model=b"short"),
    "too few bytes": changed(PAGE, data=bytes(SHAPE.nbytes - 1)),
    "too many bytes": changed(PAGE, data=bytes(SHAPE.nbytes + 1)),
    "no end": [*changed(PAGE, last=False)],
    "an end too many": [*changed(PAGE, last=False), missing(PAGE)],
    "a page inside a page": [*changed(PAGE, data=b"x", last=False), *chunks(NEXT)],
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_stream_of_pages_fails(hostile: tuple[Hostile, RemoteOriginals], name: str) -> None:
    service, remote = hostile
    service.answer = BROKEN[name]
    with pytest.raises(OriginalsError):
        await wait(remote.fetch([PAGE.id, NEXT.id], SHAPE))
    assert not remote._held._holders


UNUSABLE = {
    "no secret": chunks(PAGE, seal(PAGE, "", MODEL)),
    "another secret": chunks(PAGE, seal(PAGE, "the secret of an attacker", MODEL)),
    "another model": chunks(PAGE, seal(PAGE, SECRET, "another model")),
    "renamed model": chunks(PAGE, seal(PAGE, SECRET, "another model")._replace(model=seal(PAGE, SECRET, MODEL).model)),
    "another page": chunks(PAGE, seal(NEXT, SECRET, MODEL), data=NEXT.to_bytes()),
    "another page's seal": chunks(PAGE, seal(NEXT, SECRET, MODEL)),
    "a flipped bit": chunks(PAGE, seal(PAGE, SECRET, MODEL), data=filled(0).to_bytes()),
    "NaN": chunks(filled(torch.nan)),
    "infinity": chunks(filled(-torch.inf)),
}


@pytest.mark.parametrize("name", UNUSABLE)
async def test_a_page_that_must_not_be_used_is_missing(hostile: tuple[Hostile, RemoteOriginals], name: str) -> None:
    service, remote = hostile
    service.answer = [*UNUSABLE[name], *chunks(NEXT)]
    before = value(metrics.originals_corrupt)
    first, second = await wait(remote.fetch([PAGE.id, NEXT.id], SHAPE))
    assert first is None
    assert second is not None
    assert torch.equal(second.data, NEXT.data)
    assert value(metrics.originals_corrupt) == before + 1
    assert dict(remote._held._holders) == {NEXT.id: 1}


@pytest.mark.parametrize("pages", [-1, 3, 2**31 - 1])
async def test_a_match_is_of_the_pages_asked_for(hostile: tuple[Hostile, RemoteOriginals], pages: int) -> None:
    service, remote = hostile
    service.answer = pb.MatchReply(pages=pages)
    with pytest.raises(OriginalsError, match="matched"):
        await wait(remote.match([PAGE.id, NEXT.id]))


async def test_rows_of_the_wrong_size_or_without_numbers_fail(
    hostile: tuple[Hostile, RemoteOriginals], quantizer: Quantizer
) -> None:
    service, remote = hostile
    request, store = make_request([PAGE, NEXT], 60, quantizer.meta_bytes), InProcessOriginals()
    store.put([PAGE, NEXT])
    right = store.requantize(request, quantizer).result()
    found, planes = right.found.astype(np.uint8).tobytes(), right.planes.tobytes()
    service.answer = pb.RequantizeReply(found=found, planes=planes)
    reply = await wait(remote.requantize(request, quantizer))
    assert reply.planes.tobytes() == planes
    for bad in (
        pb.RequantizeReply(),
        pb.RequantizeReply(found=found[:-1], planes=planes),
        pb.RequantizeReply(found=found + b"\1", planes=planes),
        pb.RequantizeReply(found=bytes(60), planes=planes),
        pb.RequantizeReply(found=found, planes=planes[:-1]),
        pb.RequantizeReply(found=found, planes=planes + b"x"),
        pb.RequantizeReply(found=found, planes=b"\xff" * len(planes)),  # NaN in rows of half precision
    ):
        service.answer = bad
        with pytest.raises(OriginalsError, match=r"wrong size|NaN"):
            await wait(remote.requantize(request, quantizer))
