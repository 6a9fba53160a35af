"""What holds for every HTTP request: an id, a bounded body, JSON that can be answered, and no bare error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common import metrics, tracing
from services.common.errors import LIMITS
from services.common.json_text import RepeatedKeyError
from services.gateway import models
from services.gateway.bodies import Bodies, Body, check_keys, check_values
from services.gateway.caller import label
from services.gateway.errors import described

REQUEST_ID_HEADER = tracing.REQUEST_ID
REQUEST_ID = "qaq.request_id"  # in the scope
EXPOSED_HEADERS = (
    *(REQUEST_ID_HEADER, "retry-after", "retry-after-ms"),
    *(f"{LIMITS}{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)
CLIENT_CLOSED_REQUEST = 499  # for the access log: the client does not read it

log = structlog.get_logger()


class Identified:
    """Wraps an app. Each response has a request id, the client's if it sent one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope[REQUEST_ID] = _request_id(Headers(scope=scope))

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        if scope["method"] != "POST":  # health checks, metrics and the like begin no trace
            await self._app(scope, receive, identified)
            return
        with tracing.http(scope["method"], scope["headers"], request_id):
            await self._app(scope, receive, identified)


class Wire:
    """Wraps an app that is wrapped by `Identified`.

    Args:
        bodies: of requests. One that is too long is refused before it is read; one that does not say its length, when
            it has become too long.
    """

    def __init__(self, app: ASGIApp, bodies: Bodies) -> None:
        self._app, self._bodies = app, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, request_id, status, begun = Headers(scope=scope), scope[REQUEST_ID], 0, time.perf_counter()
        body = Body(self._bodies, receive, _has_body(headers), label(scope))

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not body.complete:  # nobody reads the rest of it
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        try:
            await self._limited(headers)(scope, body.receive, noted)
        except ClientDisconnect:
            status = status or CLIENT_CLOSED_REQUEST
        except Exception as error:
            log.error("unexpected error", request=request_id, path=scope["path"], exc_info=error)
            if status:
                raise  # the response has begun: its connection is closed
            await _internal(request_id)(scope, receive, noted)
        finally:
            body.close()
            path = getattr(scope.get("route"), "path", "other")
            tracing.tell(**{"http.route": path, "http.response.status_code": status})
            metrics.http_requests.labels(path, status).inc()
            metrics.http_seconds.labels(path).observe(time.perf_counter() - begun)

    def _limited(self, headers: Headers) -> ASGIApp:
        """The app, or a refusal of a body that is too long."""
        length, limit = headers.get("content-length", "0"), self._bodies.limit
        if length.isdecimal() and int(length[:20]) <= limit:
            return self._app
        message = f"the body is {length[:20]} bytes; send at most {limit:,}"
        return JSONResponse(described(message, 413, "request_too_large"), 413)


class JsonRequest(Request):
    """A request whose JSON must be valid Unicode, of finite numbers and unique keys, and neither too deep nor of too
    many values."""

    async def json(self) -> Any:
        """Raises:
        HTTPException: it is not.
        """
        body = await self.body()
        check_values(body)
        await asyncio.sleep(0)  # others are heard: counting and parsing take up to 50 ms each
        try:
            value = from_json(body, allow_inf_nan=False, cache_strings="keys")
        except ValueError as error:
            raise HTTPException(400, f"the body is not valid JSON: {error}") from error
        await asyncio.sleep(0)
        try:
            check_keys(body, value)
        except RepeatedKeyError as error:
            raise HTTPException(400, f"the body is ambiguous: {error}") from error
        return value


class JsonRoute(APIRoute):
    """A route that reads a `JsonRequest`, once a router has said that its caller may ask."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            if self.body_field is not None and _has_body(request.headers):
                _check_type(request.headers)
                await models.ask(request)
            return await handle(JsonRequest(request.scope, request.receive))

        return handler


def _check_type(headers: Headers) -> None:
    """Raises:
    HTTPException: a body with these headers is not plain JSON in UTF-8.
    """
    given = "; ".join(dict.fromkeys(headers.getlist("content-type")))
    kind, *parameters = (part.strip().lower() for part in given.split(";"))
    if not kind.startswith("application/") or not (kind.endswith(("/json", "+json"))):
        told = f'the content-type is "{given[:100]}"' if given else "there is no content-type"
        raise HTTPException(415, f"{told}; send the body as application/json")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "charset" and value.strip('"') not in ("utf-8", "utf8", "us-ascii"):
            raise HTTPException(415, f'the content-type has the charset "{value[:50]}"; send the body in UTF-8')
    coding = ", ".join(headers.getlist("content-encoding"))
    if coding.strip().lower() not in ("", "identity"):
        raise HTTPException(415, f'the content-encoding is "{coding[:50]}"; send the body as it is, without one')


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if tracing.valid_id(given) else tracing.new_id()


def _internal(request_id: str) -> JSONResponse:
    message = f"internal error; the gateway's log has more about request {request_id}"
    return JSONResponse(described(message, 500, "internal_error"), 500)
