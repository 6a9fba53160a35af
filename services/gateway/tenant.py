"""The tenant of an HTTP request."""

from __future__ import annotations

from fastapi import Request

from services.common.errors import InvalidArgument
from services.common.limits import MAX_TENANT

HEADER = "x-qaq-tenant"


def tenant(request: Request) -> tuple[tuple[str, str], ...]:
    """The header `x-qaq-tenant` as gRPC metadata.

    Raises:
        InvalidArgument: it is too long, or has characters other than printable ASCII.
    """
    name = request.headers.get(HEADER, "")
    if not name:
        return ()
    if len(name) > MAX_TENANT or not (name.isascii() and name.isprintable()):
        raise InvalidArgument(f"{HEADER} is invalid; send at most {MAX_TENANT} printable ASCII characters")
    return (("qaq-tenant", name),)
