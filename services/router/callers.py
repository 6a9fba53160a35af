"""Who calls: the tenant whose key a call has, from a tenants file that may change at any time."""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import structlog

from qaq_core.base.errors import ConfigError
from services.common import metrics, tenants
from services.common.bounds import one
from services.common.errors import InvalidArgument, StatusError, Unauthenticated
from services.common.tenants import Quotas, Tenant
from services.router import validation

CHECK_S = 1.0
"""How often the file is looked at, at most."""
MAX_KEY = 512
INVALID_KEY = "invalid_api_key"
"""Reason of errors, as OpenAI's API names it."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Caller:
    """Whom a call is from.

    Attributes:
        operator: may list and close the sessions of all tenants.
    """

    tenant: str
    operator: bool = False
    quotas: Quotas = field(default_factory=Quotas)


class Callers:
    """Tells who calls by the metadata of a call.

    With a tenants file a call needs `authorization: Bearer KEY`. Without one nobody is authenticated: the tenant is
    whatever the metadata `qaq-tenant` says, and callers that do not send it are one tenant.

    The file is read again when it changes. One that cannot be used changes nothing; it is logged once and counted.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._keys: dict[str, tuple[str, Tenant]] = {}
        self._version: object = None
        self._checked = 0.0
        if path is not None:
            self._version = _version(path)
            self._read(path)

    @property
    def asked(self) -> bool:
        """Whether callers are asked who they are."""
        return self._path is not None

    def of(self, context: grpc.aio.ServicerContext) -> Caller:
        """Whom a call is from; raises as `known`."""
        return self.known(context.invocation_metadata())

    def known(self, metadata: Iterable[tuple[str, Any]] | None) -> Caller:
        """Raises:
        Unauthenticated: there is no key, or none of a tenant.
        InvalidArgument: `qaq-tenant` is too long, or is not the tenant of the key; or one of both has several values.
        """
        sent = [(name, str(value)) for name, value in metadata or ()]
        named = one("qaq-tenant", (value for name, value in sent if name == "qaq-tenant"))
        authorization = one("authorization", (value for name, value in sent if name == "authorization"))
        validation.tenant(named)
        if self._path is None:
            return Caller(named)
        self._follow(self._path)
        try:
            tenant = self._tenant(authorization)
        except Unauthenticated:
            metrics.unauthenticated.inc()
            raise
        if named not in ("", tenant.name):
            raise InvalidArgument("qaq-tenant is not the tenant of this key, which says who calls; leave it out")
        return Caller(tenant.name, tenant.role == "operator", tenant.quotas)

    def _tenant(self, authorization: str) -> Tenant:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not 0 < len(key) <= MAX_KEY:
            raise Unauthenticated(
                "a key is needed; set QAQ_API_KEY to it for `qaq` commands, or send it as `authorization: Bearer KEY` "
                "(`qaq up` names one, `qaq key` makes one)",
                reason=INVALID_KEY,
            )
        digest = tenants.hashed(key.strip())
        # By a part of the hash, so that the whole one is compared in constant time.
        expected, tenant = self._keys.get(digest[:16], ("", None))
        if tenant is None or not hmac.compare_digest(digest, expected):
            placeholder = "" if key.startswith(tenants.PREFIX) else f" (keys of QAQ begin with {tenants.PREFIX})"
            raise Unauthenticated(
                f"this key is of no tenant{placeholder}; set QAQ_API_KEY to the one that `qaq up` or `qaq key` names, "
                "or ask for another one",
                reason=INVALID_KEY,
            )
        return tenant

    def _follow(self, path: Path) -> None:
        """Reads the file again if it has changed."""
        if time.monotonic() < self._checked + CHECK_S:
            return
        self._checked = time.monotonic()
        version = _version(path)
        if version == self._version:
            return
        self._version = version
        try:
            self._read(path)
        except ConfigError as error:
            metrics.tenants_failures.inc()
            log.error("the tenants file cannot be used; the tenants stay as they were", error=str(error))
        else:
            log.info("the tenants file was read again", keys=len(self._keys))

    def _read(self, path: Path) -> None:
        listed = tenants.load(path).tenants
        self._keys = {key[:16]: (key, tenant) for tenant in listed for key in tenant.keys}


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call that is from nobody, before its request is read: a method cannot be forgotten.

    gRPC's own services, health and reflection, need no key.
    """

    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc."):
            return handler
        try:
            self._callers.known(details.invocation_metadata)
        except StatusError as refusal:
            return _refusing(handler, refusal)
        return handler


def _refusing(handler: grpc.RpcMethodHandler, refusal: StatusError) -> grpc.RpcMethodHandler:
    """A method of the same kind that raises."""

    async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
        raise refusal

    async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
        raise refusal
        yield

    sends = "stream" if handler.request_streaming else "unary"
    answers = "stream" if handler.response_streaming else "unary"
    make = getattr(grpc, f"{sends}_{answers}_rpc_method_handler")
    return make(
        stream if handler.response_streaming else unary,
        request_deserializer=lambda raw: raw,
        response_serializer=handler.response_serializer,
    )


def _version(path: Path) -> object:
    """Changes when the file does."""
    try:
        status = os.stat(path)
    except OSError as error:
        return error.errno
    return status.st_ino, status.st_mtime_ns, status.st_size
