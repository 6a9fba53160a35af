"""Errors with a gRPC status, and the gRPC status of every expected error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from redis import exceptions as redis_errors

from qaq_core.base import errors as core
from services.common.redis import RedisUnreachableError, is_full

Code = grpc.StatusCode
Metadata = tuple[tuple[str, str], ...]
LIMITS = "x-ratelimit-"
"""What the names of metadata and headers about quotas begin with, as in OpenAI's API."""
EXCEEDED = "rate_limit_exceeded"
"""Reason of a call that exceeds a quota, as OpenAI's API names it."""

RETRY_AFTER_MS = 2000
"""For a caller whom Redis refused, or did not answer."""


class StatusError(Exception):
    """An error for the caller: a gRPC status, and a message that says what to change.

    Args:
        retry_after_ms: sent to the caller as trailing metadata `retry-after-ms`.
        reason: a name for programs that tell errors of one status apart; sent as trailing metadata `qaq-reason`.
        limits: what is left of the caller's quotas, as more trailing metadata, whose names begin with `x-ratelimit-`.
    """

    code: grpc.StatusCode = Code.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        retry_after_ms: int | None = None,
        reason: str = "",
        limits: Metadata = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.retry_after_ms, self.reason, self.limits = retry_after_ms, reason, limits


class InvalidArgument(StatusError):
    """The request is invalid in any state of the server."""

    code = Code.INVALID_ARGUMENT


class Unauthenticated(StatusError):
    """The caller has not said who it is."""

    code = Code.UNAUTHENTICATED


class PermissionDenied(StatusError):
    """The caller is known and may not do this."""

    code = Code.PERMISSION_DENIED


class NotFound(StatusError):
    """Something that the request names does not exist."""

    code = Code.NOT_FOUND


class FailedPrecondition(StatusError):
    """The request is valid, but not in the present state of the server."""

    code = Code.FAILED_PRECONDITION


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


# What Redis says of a value of another type, or that is no number, to a command or in a script.
_DAMAGED = ("WRONGTYPE", "not an integer", "not a valid float", "attempt to perform arithmetic", "attempt to compare")


def _of_redis(error: redis_errors.RedisError) -> StatusError | None:
    if is_full(error):
        return ResourceExhausted("Redis is full; raise its maxmemory or close sessions", retry_after_ms=RETRY_AFTER_MS)
    # Redis raises these while it starts, too. A lost, a busy and a starting server are the same for the caller.
    if isinstance(error, redis_errors.ConnectionError | redis_errors.TimeoutError):
        message = "Redis does not answer; check that it runs and that QAQ_REDIS_URL is right"
        return Unavailable(message, retry_after_ms=RETRY_AFTER_MS)
    if "MISCONF" in str(error):  # its disk is full or fails, and it was told to refuse writes then
        message = "Redis cannot write to its disk and refuses to change anything; see its log, and make room"
        return Unavailable(message, retry_after_ms=RETRY_AFTER_MS)
    # The one that was asked is no primary any more, or has too few replicas.
    if any(sign in str(error) for sign in ("READONLY", "NOREPLICAS", "MASTERDOWN")):
        message = "Redis does not take writes now; if its sentinels choose another primary, try again"
        return Unavailable(message, retry_after_ms=RETRY_AFTER_MS)
    if any(sign in str(error) for sign in _DAMAGED):
        return StatusError(
            "a value in Redis is none that QAQ writes; close the session that it is of, or find what else writes to "
            "this Redis, and remove it",
            code=Code.DATA_LOSS,
        )
    return None


def limits_of(metadata: Iterable[tuple[str, Any]] | None) -> Metadata:
    """What metadata says of the caller's quotas."""
    return tuple((name, str(value)) for name, value in metadata or () if name.startswith(LIMITS))


def to_status(error: Exception) -> StatusError | None:
    """The status of an expected error; None for an unexpected one."""
    if isinstance(error, StatusError):
        return error
    for kind, code in _CODES:
        if isinstance(error, kind):
            return StatusError(str(error), code=code)
    if isinstance(error, redis_errors.RedisError):
        return _of_redis(error)
    if isinstance(error, grpc.aio.AioRpcError):
        metadata = dict(error.trailing_metadata() or ())
        retry, reason = metadata.get("retry-after-ms"), str(metadata.get("qaq-reason", ""))
        message = error.details() or "a call to another server failed"
        retry_ms, limits = int(retry) if retry else None, limits_of(metadata.items())
        return StatusError(message, code=error.code(), retry_after_ms=retry_ms, reason=reason, limits=limits)
    if isinstance(error, TimeoutError):
        return StatusError("the deadline passed before the answer was ready", code=Code.DEADLINE_EXCEEDED)
    return None
