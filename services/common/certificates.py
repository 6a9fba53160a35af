"""A CA of one deployment, and a certificate for each role."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from qaq_core.base.errors import ConfigError
from services.common.private_files import warn_if_readable, write_private
from services.common.roles import ROLES, Role, server_name, uri

CA_DAYS = 3650
DAYS = 365
# A clock that is a little behind must accept a certificate at once.
_BACKDATED = timedelta(minutes=10)
# Servers that clients find by their address, and not by their role.
_ADDRESSED: frozenset[Role] = frozenset({"router", "gateway", "redis"})
_LOCAL = ("localhost", "127.0.0.1", "::1")


def issue(directory: Path, hosts: Sequence[tuple[Role, str]] = (), days: float = DAYS) -> None:
    """Writes a CA, `ca.pem` and `ca-key.pem`, and a directory for each role: `ca.pem`, `cert.pem` and `key.pem`.

    A CA that is there issues new certificates, for their renewal. Keys have mode 0600, and each file is replaced at
    once.

    Args:
        hosts: further host names or addresses of a role's server.
        days: how long certificates hold.
    Raises:
        ConfigError: what is there is not a CA with its key.
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = Authority.load(directory) or Authority.make(directory)
    for role in ROLES:
        names = [role, *_LOCAL] if role in _ADDRESSED else [role]
        authority.issue(directory, role, [*names, *(host for named, host in hosts if named == role)], days)


def files(directory: Path, role: Role) -> tuple[Path, Path, Path]:
    """CA, certificate and key of a role in a directory that `issue` wrote."""
    return directory / role / "ca.pem", directory / role / "cert.pem", directory / role / "key.pem"


class Authority:
    """A CA and its key."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate, self._key = certificate, key

    @classmethod
    def make(cls, directory: Path) -> Authority:
        """A new one, written to `ca.pem` and `ca-key.pem`."""
        key = ec.generate_private_key(ec.SECP256R1())
        # CAs of one name, both trusted while one replaces the other, would be taken for each other.
        name = _name(f"QAQ CA {secrets.token_hex(4)}")
        signs = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = (
            _builder(name, name, key, CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(signs, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        write_private(directory / "ca-key.pem", _key_pem(key))
        write_private(directory / "ca.pem", certificate.public_bytes(Encoding.PEM), 0o644)
        return cls(certificate, key)

    @classmethod
    def load(cls, directory: Path) -> Authority | None:
        """The one that `make` wrote; None if there is none.

        Raises:
            ConfigError: one of its files is missing or damaged.
        """
        paths = directory / "ca.pem", directory / "ca-key.pem"
        if not any(path.exists() for path in paths):
            return None
        try:
            certificate = x509.load_pem_x509_certificate(paths[0].read_bytes())
            key = load_pem_private_key(paths[1].read_bytes(), None)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{directory} has no CA with its key ({error}); name another directory") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{paths[1]} is not the key of {paths[0]}; name another directory")
        warn_if_readable(paths[1])
        return cls(certificate, key)

    def issue(self, directory: Path, role: Role, hosts: Iterable[str] = (), days: float = DAYS) -> None:
        """Writes the directory of a role: a certificate, which names the hosts too, with a new key."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri(role))]
        names += [_host(name) for name in (server_name(role), server_name(None), *hosts)]
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(_name(f"QAQ {role}"), self._certificate.subject, key, days)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        ca_path, cert_path, key_path = files(directory, role)
        cert_path.parent.mkdir(mode=0o700, exist_ok=True)
        write_private(ca_path, self._certificate.public_bytes(Encoding.PEM), 0o644)
        write_private(key_path, _key_pem(key))
        write_private(cert_path, certificate.public_bytes(Encoding.PEM), 0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
