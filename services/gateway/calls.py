"""Runs the gRPC calls of one HTTP request, and cancels them when its client disconnects."""

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

_QUEUED = 64  # messages of all calls that wait for the client; beyond it gRPC's flow control takes effect
END_S = 5.0
"""How long to wait for cancelled tasks."""

log = structlog.get_logger()


class ClientGone(Exception):
    """The client has disconnected."""


async def merged(calls: Sequence[Stream]) -> AsyncGenerator[Tagged, None]:
    """Messages of several generations as they arrive, with the index of their call. All are cancelled at the end.

    Raises:
        grpc.aio.AioRpcError, StatusError: the error of the first call that failed.
    """
    queue: asyncio.Queue[Tagged | Exception | None] = asyncio.Queue(_QUEUED)

    async def read(place: int, call: Stream) -> None:
        try:
            async for reply in call:
                await queue.put((place, reply))
            await queue.put(None)
        except (grpc.aio.AioRpcError, StatusError) as error:
            await queue.put(error)

    readers = [asyncio.create_task(read(place, call)) for place, call in enumerate(calls)]
    try:
        running = len(calls)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for call in calls:
            call.cancel()
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers, timeout=END_S)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects.

    Raises:
        ClientGone: the client has disconnected.
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
    """Chunks as server-sent events. An error before the first chunk is raised; a later one is the last event."""
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
