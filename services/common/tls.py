"""TLS from an identity, for gRPC and for Python's own servers. Every new connection has the files as they are then."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

import grpc

from services.common.identity import Identity, Pems


def channel_credentials(pems: Pems) -> grpc.ChannelCredentials:
    """Of a client that shows its certificate, if it has one."""
    return grpc.ssl_channel_credentials(pems.ca, pems.key, pems.cert)


def server_credentials(identity: Identity, *, certificates: bool) -> grpc.ServerCredentials:
    """Of a server.

    Args:
        certificates: clients must show a certificate of the CA. Otherwise they are not asked for one.
    """
    shown = identity.pems

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Asked at every handshake; None is no change."""
        nonlocal shown
        pems = identity.pems
        if pems is shown:
            return None
        shown = pems
        return _configuration(pems)

    return grpc.dynamic_ssl_server_credentials(_configuration(shown), renewed, certificates)


def server_context(identity: Identity, *, certificates: bool) -> ssl.SSLContext:
    """Of a server that is not gRPC's; `certificates` as above."""
    context = _context(identity, certificates)
    renew(context, identity, certificates=certificates)
    return context


def renew(context: ssl.SSLContext, identity: Identity, *, certificates: bool) -> None:
    """Makes the handshakes of a server's context use the files as they are then."""
    pems, current = identity.pems, context

    def begin(connection: ssl.SSLObject, name: str | None, listening: ssl.SSLContext) -> None:
        """Called at the beginning of every handshake, with or without a server's name in it."""
        nonlocal pems, current
        latest = identity.pems
        if latest is not pems:
            with contextlib.suppress(OSError):  # the files change at this moment; the next handshake looks again
                current, pems = _context(identity, certificates), latest
        connection.context = current

    context.sni_callback = begin


def _configuration(pems: Pems) -> Any:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], pems.ca)


def _context(identity: Identity, certificates: bool) -> ssl.SSLContext:
    assert identity.cert is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(identity.cert, identity.key)
    context.load_verify_locations(cadata=identity.pems.ca.decode("ascii"))
    context.verify_mode = ssl.CERT_REQUIRED if certificates else ssl.CERT_NONE
    return context
