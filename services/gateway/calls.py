"""Runs the gRPC calls of one HTTP request, and ends them when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

import grpc
import structlog
from fastapi import Request
from fastapi.responses import StreamingResponse
from qaq.v1 import generate_pb2

from services.common.errors import StatusError
from services.common.streams import Stream
from services.gateway import errors

T = TypeVar("T")
Tagged = tuple[int, generate_pb2.GenerateReply]

_WAITING = 64  # messages of all calls that wait for the client; gRPC's own flow control holds back the rest
END_S = 5.0
"""How long to wait for what was cancelled."""

log = structlog.get_logger()


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def merged(calls: Sequence[Stream]) -> AsyncGenerator[Tagged, None]:
    """Messages of several generations as they come, with their place. All are cancelled when this ends.

    Raises:
        grpc.aio.AioRpcError, StatusError: of the first that failed.
    """
    queue: asyncio.Queue[Tagged | Exception | None] = asyncio.Queue(_WAITING)

    async def read(place: int, call: Stream) -> None:
        try:
            async for reply in call:
                await queue.put((place, reply))
            await queue.put(None)
        except (grpc.aio.AioRpcError, StatusError) as error:
            await queue.put(error)

    readers = [asyncio.create_task(read(place, call)) for place, call in enumerate(calls)]
    try:
        going_on = len(calls)
        while going_on:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                going_on -= 1
            else:
                yield item
    finally:
        for call in calls:
            call.cancel()
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers, timeout=END_S)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientGone: it did.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait([task, gone], timeout=END_S)


async def events(chunks: AsyncGenerator[dict[str, Any], None]) -> StreamingResponse:
    """Chunks as server-sent events. What fails before the first is raised, what fails later is the last event."""
    first = await anext(chunks)

    async def stream() -> AsyncIterator[str]:
        async with contextlib.aclosing(chunks):
            yield _event(first)
            try:
                async for chunk in chunks:
                    yield _event(chunk)
            except (grpc.aio.AioRpcError, StatusError) as error:
                yield _event(errors.body(error))
                return
            except Exception as error:
                log.error("a stream failed", exc_info=error)
                yield _event(errors.body(error))
                return
            yield "data: [DONE]\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
