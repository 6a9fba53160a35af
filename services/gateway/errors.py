"""Errors in OpenAI's format."""

from __future__ import annotations

from typing import Any

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from services.common.errors import StatusError, to_status

Code = grpc.StatusCode
_HTTP = {
    Code.INVALID_ARGUMENT: 400,
    Code.FAILED_PRECONDITION: 400,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.ABORTED: 409,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def install(app: FastAPI) -> None:
    """Gives every error of the app OpenAI's format."""

    @app.exception_handler(grpc.aio.AioRpcError)
    async def refused(request: Request, error: grpc.aio.AioRpcError) -> JSONResponse:
        return response(error)

    @app.exception_handler(StatusError)
    async def status(request: Request, error: StatusError) -> JSONResponse:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(_malformed(error), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(_object(str(error.detail), error.status_code), error.status_code)


def response(error: Exception) -> JSONResponse:
    """An error as the response."""
    status = _http(error)
    headers = {}
    for key, value in (error.trailing_metadata() or ()) if isinstance(error, grpc.aio.AioRpcError) else ():
        if key == "retry-after-ms":
            headers = {"retry-after-ms": str(value), "retry-after": str(-(-int(value) // 1000))}
    return JSONResponse(body(error), status, headers=headers)


def body(error: Exception) -> dict[str, Any]:
    """An error as JSON, for a response or for a stream that has begun."""
    status = to_status(error)
    message = status.message if status else "internal error; see the gateway's log"
    return _object(message, _http(error), status.code.name.lower() if status else None)


def _http(error: Exception) -> int:
    status = to_status(error)
    return _HTTP.get(status.code, 500) if status else 500


def _malformed(error: RequestValidationError) -> dict[str, Any]:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        message = f"{place} is not supported here; leave it out"
    else:
        message = f"{place or 'the body'}: {first['msg']}"
    return _object(message, 400, "invalid_argument", place or None)


def _object(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
