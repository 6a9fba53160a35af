"""What holds for every HTTP request: an id, a bounded body, JSON that can be answered, and no bare error."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common import metrics
from services.common.errors import LIMITS
from services.gateway.errors import described

REQUEST_ID_HEADER = "x-request-id"
EXPOSED_HEADERS = (
    *(REQUEST_ID_HEADER, "retry-after", "retry-after-ms"),
    *(f"{LIMITS}{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)
_MAX_ID = 128

log = structlog.get_logger()


class Wire:
    """Wraps an app. Each response has a request id, the client's if it sent one.

    Args:
        max_body_bytes: of a request. A longer one is refused before it is read; one that does not say its length, when
            it has become too long.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id, status, begun = _request_id(headers), 0, time.perf_counter()

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._limited(headers)(scope, self._bounded(receive), identified)
        except Exception as error:
            log.error("unexpected error", request=request_id, path=scope["path"], exc_info=error)
            if status:
                raise  # the response has begun: its connection is closed
            await _internal(request_id)(scope, receive, identified)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            metrics.http_requests.labels(path, status).inc()
            metrics.http_seconds.labels(path).observe(time.perf_counter() - begun)

    def _bounded(self, receive: Receive) -> Receive:
        """Reads a body until it has become too long."""
        left = self._max_body_bytes

        async def received() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the body is too long; send at most {self._max_body_bytes:,} bytes")
            return message

        return received

    def _limited(self, headers: Headers) -> ASGIApp:
        """The app, or a refusal of a body that is too long."""
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) <= self._max_body_bytes:
            return self._app
        return JSONResponse(
            described(f"the body is {length} bytes; send at most {self._max_body_bytes:,}", 413, "request_too_large"),
            413,
            headers={"connection": "close"},
        )


class JsonRequest(Request):
    """A request whose JSON must be valid Unicode, of finite numbers, and not too deep."""

    async def json(self) -> Any:
        """Raises:
        HTTPException: it is not.
        """
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not valid JSON: {error}") from error


class JsonRoute(APIRoute):
    """A route that reads a `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handler


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    if given and len(given) <= _MAX_ID and given.isascii() and given.isprintable():
        return given
    return f"req_{uuid.uuid4().hex}"


def _internal(request_id: str) -> JSONResponse:
    message = f"internal error; the gateway's log has more about request {request_id}"
    return JSONResponse(described(message, 500, "internal_error"), 500)
