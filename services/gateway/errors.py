"""Errors in OpenAI's format. `param` and `code` are what clients of OpenAI's API look at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    Code.INVALID_ARGUMENT: "invalid_value",
    Code.FAILED_PRECONDITION: "failed_precondition",
    Code.UNAUTHENTICATED: "invalid_api_key",
    Code.PERMISSION_DENIED: "permission_denied",
    Code.NOT_FOUND: "not_found",
    Code.ABORTED: "aborted",
    Code.RESOURCE_EXHAUSTED: "rate_limit_exceeded",
    Code.UNAVAILABLE: "unavailable",
    Code.DATA_LOSS: "data_loss",
    Code.DEADLINE_EXCEEDED: "deadline_exceeded",
}
_INVALID = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}

_OF_HTTP = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
}

# The router's messages begin with a field of the gRPC API; HTTP has other names for some.
_FIELD = re.compile(r"(?:(?:sampling|stop|output)\.)?([a-z_]+)(?=[\[.: ])")
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "choices": "n",
    "prompt_token_ids": "prompt",
    "text": "prompt",
    "token_ids": "tokens",
}
# Where they name such a field later on.
_WITHIN = re.compile(r"\b(?:sampling|stop|output)\.([a-z_]+)")
# Its methods, where a message says what to use.
_PATH_OF = {"OpenSession": "POST /v1/sessions", "use Generate": "use /v1/completions"}
_METHOD = re.compile("|".join(_PATH_OF))
_FIELDS = {
    *_NAMES,
    *("model", "prompt", "messages", "session_id", "cache", "stop", "stop_token_ids", "logit_bias"),
    "max_completion_tokens",
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("logprobs", "top_logprobs", "prompt_logprobs", "stream_options", "best_of", "n"),
    *("tools", "tool_choice", "chat_template_kwargs", "response_format", "structured_outputs"),
    *("lambda_floor", "target_bits", "kv_budget_bytes"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
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
        told = described(str(error.detail), error.status_code, _OF_HTTP.get(error.status_code))
        return JSONResponse(told, error.status_code, headers=error.headers)


def response(error: Exception) -> JSONResponse:
    """An error as the response."""
    status = to_status(error)
    headers: dict[str, str] = {}
    if status is not None:
        headers |= dict(status.limits)
        if status.retry_after_ms is not None:
            headers["retry-after-ms"] = str(status.retry_after_ms)
            headers["retry-after"] = str(-(-status.retry_after_ms // 1000))
        if status.code is Code.UNAUTHENTICATED:
            headers["www-authenticate"] = "Bearer"
    return JSONResponse(body(error), _http(status), headers=headers)


def body(error: Exception) -> dict[str, Any]:
    """An error as JSON, for a response or for a stream that has begun."""
    status = to_status(error)
    if status is None:
        return described("internal error; see the gateway's log", 500, "internal_error")
    code = status.reason or _CODES.get(status.code, "internal_error")
    message, field = _named(status.message)
    return described(message, _http(status), code, "model" if code == "model_not_found" else field)


def described(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's format; `status` is that of HTTP."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _http(status: StatusError | None) -> int:
    return _HTTP.get(status.code, 500) if status else 500


def _named(message: str) -> tuple[str, str | None]:
    """A message of the router with HTTP's names of methods and of the field that it begins with, and that field."""
    message = _METHOD.sub(lambda method: _PATH_OF[method[0]], message)
    match = _FIELD.match(message)
    if match is None or match[1] not in _FIELDS:
        return message, None
    name = _NAMES.get(match[1], match[1])
    rest = _WITHIN.sub(lambda field: _NAMES.get(field[1], field[1]), message[match.end() :])
    return name + rest, name


def _malformed(error: RequestValidationError) -> dict[str, Any]:
    # Of the errors of a field that may have several types, that of the type which fits best is the deepest one.
    wrong = max(error.errors(), key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    kind, *parts = wrong["loc"]
    sent = {str(name): None for name in parts} if kind == "query" else error.body
    place = ".".join(_place(parts, sent, wrong["type"] == "missing"))[:200]
    if wrong["type"] == "extra_forbidden":
        message = f"{place} is not supported here; leave it out"
    else:
        message = f"{place or 'the body'}: {str(wrong['msg']).removeprefix('Value error, ')}"
    return described(message, 400, _INVALID.get(wrong["type"], "invalid_value"), place or None)


def _place(parts: Sequence[Any], sent: Any, missing: bool) -> Iterator[str]:
    """The parts of a place that the client has sent. Others are pydantic's: the type that it tried of several.

    Args:
        sent: the body. missing: the last part is a field that was not sent.
    """
    for left, part in zip(reversed(range(len(parts))), parts, strict=True):
        if (isinstance(sent, dict) and part in sent) or (isinstance(sent, list) and part in range(len(sent))):
            sent = sent[part]
            yield str(part)
        elif missing and not left:
            yield str(part)
