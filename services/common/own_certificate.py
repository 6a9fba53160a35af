"""A server's own certificate, looked at by itself before its callers do: role, names, uses, and the CA."""

from __future__ import annotations

import ssl

from cryptography import x509

from qaq_core.base.errors import ConfigError
from services.common import tls
from services.common.identity import Identity
from services.common.roles import Role, role_of, server_name

_ROUNDS = 8  # of a handshake, which takes three


def check_own(who: Identity, role: Role | None) -> None:
    """Does what the first caller and the first server that is called would do.

    Args:
        role: of the server; None is any.
    Raises:
        ConfigError: they would refuse the certificate; the message says why.
    """
    assert who.cert is not None
    assert who.pems.cert is not None
    named = role_of(_uris(x509.load_pem_x509_certificates(who.pems.cert)[0]))
    if named is None or role not in (None, named):
        has = f"is of the role {named}" if named else "names no role of QAQ"
        raise ConfigError(
            f"the certificate {who.cert} {has}, and this is a server of the role {role or 'any'}; set QAQ_TLS_CERT and "
            f"QAQ_TLS_KEY to those of {role or 'its role'} (`qaq certificates` makes them)"
        )
    try:
        _greet(who, server_name(role or named))
    except ssl.SSLError as error:
        why = getattr(error, "verify_message", "") or error.reason or str(error)
        raise ConfigError(
            f"the certificate {who.cert} would be refused by everybody who trusts {who.ca} ({why}); set QAQ_TLS_CERT, "
            "QAQ_TLS_KEY and QAQ_TLS_CA to files of one CA (`qaq certificates` makes them)"
        ) from error


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _greet(who: Identity, name: str) -> None:
    """A handshake with itself, in memory, in which both sides show the certificate.

    Raises:
        ssl.SSLError: a side refuses it.
    """
    calling = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    calling.load_cert_chain(str(who.cert), str(who.key))
    calling.load_verify_locations(cadata=who.pems.ca.decode("ascii"))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = calling.wrap_bio(down, up, server_hostname=name)
    server = tls.server_context(who, certificates=True).wrap_bio(up, down, server_side=True)
    for _ in range(_ROUNDS):
        done = [_step(side) for side in (client, server)]
        if all(done) and not up.pending:
            return
    raise ssl.SSLError("the handshake does not end")


def _step(side: ssl.SSLObject) -> bool:
    """Whether a side's handshake has ended."""
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
