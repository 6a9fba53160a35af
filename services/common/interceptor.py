"""Decodes requests and converts errors to gRPC statuses, for every method of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from services.common import tracing
from services.common.errors import InvalidArgument, ResourceExhausted, to_status
from services.common.roles import Guard

MESSAGE_S = 30.0
"""How long a client may take for its call's next message: a call that is silent holds one of the server's places."""

log = structlog.get_logger()

Deserializer = Callable[[bytes], Any]


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method except those of gRPC's own services.

    Requests are decoded here instead of by gRPC, so that a malformed request (for example with invalid UTF-8) or a
    request that is too large gets INVALID_ARGUMENT and a message. Unexpected errors are logged with their traceback and
    reach the caller as INTERNAL without details.

    Every method is given to gRPC as one that reads a stream, which is the same to a client: gRPC itself would wait for
    the message of a unary call without an end.

    Args:
        guard: checks the caller first.
    """

    def __init__(self, max_request_bytes: int, guard: Guard | None = None) -> None:
        self._max_request_bytes = max_request_bytes
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc."):
            return handler
        return self._wrap(handler, details.method)

    def _wrap(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        admit = self._guard.check if self._guard else _anyone
        behaviour = getattr(handler, f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}")

        async def given(raw: AsyncIterator[bytes]) -> Any:
            """What the method takes: its message, or all of them."""
            messages = aiter(raw)
            if handler.request_streaming:
                return self._all(messages, handler.request_deserializer)
            message = await _next(messages)
            if message is None:
                raise InvalidArgument("the call has no message; send one")
            return self._decode(message, handler.request_deserializer)

        async def unary(raw: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
            try:
                with tracing.serving(method, context.invocation_metadata()):
                    admit(method, context)
                    return await behaviour(await given(raw), context)
            except Exception as error:
                await _abort(context, error, method)

        async def stream(raw: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                with tracing.serving(method, context.invocation_metadata()):
                    admit(method, context)
                    async with aclosing(behaviour(await given(raw), context)) as replies:
                        async for reply in replies:
                            yield reply
            except Exception as error:
                await _abort(context, error, method)

        make = getattr(grpc, f"stream_{_arity(handler.response_streaming)}_rpc_method_handler")
        wrapped = stream if handler.response_streaming else unary
        return make(wrapped, request_deserializer=None, response_serializer=handler.response_serializer)

    def _decode(self, raw: bytes, deserialize: Deserializer) -> Any:
        if len(raw) > self._max_request_bytes:
            raise InvalidArgument(
                f"the request has {len(raw):,} bytes and at most {self._max_request_bytes:,} are accepted; "
                "make it shorter"
            )
        try:
            return deserialize(raw)
        except DecodeError as error:
            raise InvalidArgument(
                "the request is not a valid message: every string must be UTF-8 and the client's protocol must be "
                "this server's"
            ) from error

    async def _all(self, messages: AsyncIterator[bytes], deserialize: Deserializer) -> AsyncIterator[Any]:
        while (message := await _next(messages)) is not None:
            yield self._decode(message, deserialize)


def _anyone(method: str, context: Any) -> None:
    """Of a server that does not know its callers."""


async def _next(messages: AsyncIterator[bytes]) -> bytes | None:
    """The next message of a call; None at its end.

    Raises:
        ResourceExhausted: the client takes too long.
    """
    try:
        async with asyncio.timeout(MESSAGE_S):
            return await anext(messages, None)
    except TimeoutError as error:
        raise ResourceExhausted(
            f"no message came for {MESSAGE_S:g} s; send a call's messages without such a pause"
        ) from error


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


async def _abort(context: grpc.aio.ServicerContext, error: Exception, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    status = to_status(error)
    if status is None:
        log.error("unexpected error", method=method, exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")
        return
    trailing: list[tuple[str, str]] = []
    if status.retry_after_ms is not None:
        trailing.append(("retry-after-ms", str(status.retry_after_ms)))
    if status.reason:
        trailing.append(("qaq-reason", status.reason))
    trailing.extend(status.limits)
    await context.abort(status.code, status.message, tuple(trailing))
