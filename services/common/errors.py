"""Errors with a gRPC status, and the gRPC status of every expected error."""

from __future__ import annotations

import grpc
from redis import exceptions as redis_errors

from qaq_core.base import errors as core
from services.common.redis import RedisUnreachableError

Code = grpc.StatusCode


class StatusError(Exception):
    """An error for the caller: a gRPC status, and a message that says what to change.

    Args:
        retry_after_ms: sent to the caller as trailing metadata `retry-after-ms`.
        reason: a name for programs that tell errors of one status apart; sent as trailing metadata `qaq-reason`.
    """

    code: grpc.StatusCode = Code.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        retry_after_ms: int | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.retry_after_ms, self.reason = retry_after_ms, reason


class InvalidArgument(StatusError):
    """The request is invalid in any state of the server."""

    code = Code.INVALID_ARGUMENT


class NotFound(StatusError):
    """Something that the request names does not exist."""

    code = Code.NOT_FOUND


class FailedPrecondition(StatusError):
    """The request is valid, but not in the present state of the server."""

    code = Code.FAILED_PRECONDITION


class PermissionDenied(StatusError):
    """The caller may not do this."""

    code = Code.PERMISSION_DENIED


class ResourceExhausted(StatusError):
    """A limit is reached: try again later, or with less."""

    code = Code.RESOURCE_EXHAUSTED


class Unavailable(StatusError):
    """A server that this one depends on does not answer: try again."""

    code = Code.UNAVAILABLE


_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (core.ConfigError, Code.INVALID_ARGUMENT),
    (core.UnsupportedModelError, Code.FAILED_PRECONDITION),
    (core.ModelLoadError, Code.FAILED_PRECONDITION),
    (core.CorruptPageError, Code.DATA_LOSS),
    (core.OriginalsError, Code.UNAVAILABLE),
    (RedisUnreachableError, Code.UNAVAILABLE),
    (core.QAQError, Code.INTERNAL),
)


def to_status(error: Exception) -> StatusError | None:
    """The status of an expected error; None for an unexpected one."""
    if isinstance(error, StatusError):
        return error
    for kind, code in _CODES:
        if isinstance(error, kind):
            return StatusError(str(error), code=code)
    if isinstance(error, redis_errors.OutOfMemoryError):
        return ResourceExhausted("Redis is full; raise its maxmemory or close sessions")
    # Redis raises these while it starts, too. A lost, a busy and a starting server are the same for the caller.
    if isinstance(error, redis_errors.ConnectionError | redis_errors.TimeoutError):
        return Unavailable("Redis does not answer; check that it runs and that QAQ_REDIS_URL is right")
    if isinstance(error, grpc.aio.AioRpcError):
        metadata = dict(error.trailing_metadata() or ())
        retry, reason = metadata.get("retry-after-ms"), str(metadata.get("qaq-reason", ""))
        message = error.details() or "a call to another server failed"
        return StatusError(message, code=error.code(), retry_after_ms=int(retry) if retry else None, reason=reason)
    if isinstance(error, TimeoutError):
        return StatusError("the deadline passed before the answer was ready", code=Code.DEADLINE_EXCEEDED)
    return None
