"""The public API for commands: calls that return when they are answered, from the next router when one is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

from qaq.v1 import generate_pb2

from services.cluster import state
from services.common import log
from services.common.redis import connect
from services.common.routers import Routers, named, registered
from services.common.streams import Asked, Stream

DEFAULT_ROUTER = "127.0.0.1:7700"
DEADLINE_S = 600.0

T = TypeVar("T")


class Inference:
    """What a command asks of routers.

    Args:
        loop: runs while a call does; between calls the terminal has the thread.
    """

    def __init__(self, loop: asyncio.Runner, routers: Routers) -> None:
        self._loop, self._routers = loop, routers

    def once(self, call: Callable[[Any], Awaitable[T]]) -> T:
        """The one answer of a call of a stub.

        Raises:
            grpc.RpcError, Unavailable: it failed; no router is there.
        """

        async def answer() -> T:
            async with self._routers.stub() as stub:
                return await call(stub)

        return self._loop.run(answer())

    def stream(
        self, request: Asked, metadata: tuple[tuple[str, str], ...] = ()
    ) -> Iterator[generate_pb2.GenerateReply]:
        """A generation's messages as they come, each once, see `Stream`.

        Raises:
            grpc.RpcError, Unavailable: it failed; no router is there, or none has gone on with it.
        """
        replies = aiter(Stream(self._routers, request, DEADLINE_S, metadata))

        async def following() -> generate_pb2.GenerateReply | None:
            return await anext(replies, None)

        # One that is left before its end is cancelled when the loop is closed, with the channel.
        while (reply := self._loop.run(following())) is not None:
            yield reply


@contextlib.contextmanager
def inference(router: str | None) -> Iterator[Inference]:
    """Of the routers that are named by comma, else of those of the stack that runs here."""
    log.configure("warning")
    with asyncio.Runner() as loop:
        stack = contextlib.AsyncExitStack()
        try:
            yield Inference(loop, loop.run(stack.enter_async_context(_reached(router))))
        finally:
            loop.run(stack.aclose())


@contextlib.asynccontextmanager
async def _reached(router: str | None) -> AsyncIterator[Routers]:
    async with contextlib.AsyncExitStack() as stack:
        find = named(router or DEFAULT_ROUTER)
        running = None if router else state.load()
        if running is not None and running.alive:
            redis = connect(running.redis["url"])
            stack.push_async_callback(redis.aclose)
            find = registered(redis)
        routers = Routers(find)
        stack.push_async_callback(routers.close)
        yield routers
