"""The public API for commands: blocking calls, with failover to another router."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from functools import partial
from typing import Any, TypeVar

from qaq.v1 import generate_pb2

from services.cli.identity import identity
from services.cli.keys import caller_key
from services.cluster import state
from services.common import log
from services.common.channel import Dial, open_channel
from services.common.errors import Metadata
from services.common.identity import Identity
from services.common.keys import WithMetadata, authorization
from services.common.redis import connect
from services.common.routers import Routers, named, registered
from services.common.streams import Asked, Stream

DEFAULT_ROUTER = "127.0.0.1:7700"
DEADLINE_S = 600.0

T = TypeVar("T")


class Inference:
    """The calls of a command.

    Args:
        key: of the caller; empty sends none.
        metadata: of every call, beside the key.
        loop: runs only during a call; between calls the thread belongs to the terminal.
    """

    def __init__(self, loop: asyncio.Runner, routers: Routers, key: str = "", metadata: Metadata = ()) -> None:
        self._loop, self._routers, self._caller = loop, routers, (*authorization(key), *metadata)

    def once(self, call: Callable[[Any], Awaitable[T]]) -> T:
        """The reply of a unary call.

        Raises:
            grpc.RpcError: the call failed.
            Unavailable: no router answers.
        """

        async def answer() -> T:
            async with self._routers.stub() as stub:
                return await call(WithMetadata(stub, self._caller))

        return self._loop.run(answer())

    def inspect(self, call: Callable[[Any], Awaitable[T]]) -> T:
        """As `once`, of the service that shows caches."""

        async def answer() -> T:
            async with self._routers.inspector() as stub:
                return await call(WithMetadata(stub, self._caller))

        return self._loop.run(answer())

    def stream(self, request: Asked) -> Generator[generate_pb2.GenerateReply]:
        """The messages of a generation as they arrive, see `Stream`. Ended early, it ends the generation.

        Raises:
            grpc.RpcError: the generation failed.
            Unavailable: no router answers, or none has continued the generation.
        """
        stream = Stream(self._routers, request, DEADLINE_S, self._caller)
        replies = aiter(stream)

        async def following() -> generate_pb2.GenerateReply | None:
            return await anext(replies, None)

        try:
            while (reply := self._loop.run(following())) is not None:
                yield reply
        finally:
            stream.cancel()
            self._loop.run(replies.aclose())


@contextlib.contextmanager
def inference(
    router: str | None, who: Identity | None = None, key: str | None = None, metadata: Metadata = ()
) -> Iterator[Inference]:
    """Calls to the routers of a comma-separated list, or to those of the stack that runs on this machine.

    Args:
        who: the certificate of the caller; None takes that of commands.
        key: of the caller; None takes the one of `caller_key`.
        metadata: of every call, beside the key.
    """
    log.configure("warning")
    key = caller_key(router) if key is None else key
    dial = partial(open_channel, identity=who or identity(router), role="router")
    with asyncio.Runner() as loop:
        stack = contextlib.AsyncExitStack()
        try:
            yield Inference(loop, loop.run(stack.enter_async_context(_reached(router, dial))), key, metadata)
        finally:
            loop.run(stack.aclose())


@contextlib.asynccontextmanager
async def _reached(router: str | None, dial: Dial) -> AsyncIterator[Routers]:
    async with contextlib.AsyncExitStack() as stack:
        find = named(router or DEFAULT_ROUTER)
        running = None if router else state.load()
        if running is not None and running.alive:
            redis = connect(running.access.settings("client")["redis_url"])
            stack.push_async_callback(redis.aclose)
            find = registered(redis)
        routers = Routers(find, dial)
        stack.push_async_callback(routers.close)
        yield routers
