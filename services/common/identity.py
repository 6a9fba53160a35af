"""Who a process is: a certificate, its key, and the CA that it trusts, from files that may change while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from qaq_core.base.errors import ConfigError
from services.common.addresses import is_local as is_loopback
from services.common.log import once
from services.common.private_files import warn_if_readable
from services.common.settings import CommonSettings

CHECK_S = 1.0
"""How often the files are looked at, at most."""

log = structlog.get_logger()


class Pems(NamedTuple):
    """The contents of the files. A client that shows no certificate has the CA alone."""

    ca: bytes
    cert: bytes | None
    key: bytes | None


class Identity:
    """A certificate with its key and a CA, read again when the files change.

    Files that cannot be used (a certificate without its key in the middle of a renewal, an expired one) are logged, and
    the last good ones stay in use. Safe for any thread.

    Raises:
        ConfigError: the files cannot be used; the message says which and why.
    """

    def __init__(self, ca: Path, cert: Path | None = None, key: Path | None = None) -> None:
        self.ca, self.cert, self.key = ca, cert, key
        self._guard = threading.Lock()
        self._looked_at = time.monotonic()
        self._seen = self._marks()
        self._pems = self._read()

    @property
    def pems(self) -> Pems:
        """The contents now; the same object as long as nothing changed."""
        with self._guard:
            if time.monotonic() - self._looked_at >= CHECK_S:
                self._looked_at = time.monotonic()
                self._look()
            return self._pems

    def _look(self) -> None:
        marks = self._marks()
        if marks == self._seen:
            return
        self._seen = marks
        try:
            self._pems = self._read()
        except ConfigError as error:
            log.warning("new certificates cannot be used; the old ones stay", reason=str(error))
        else:
            log.info("new certificates are in use", certificate=str(self.cert or self.ca))

    def _marks(self) -> Sequence[tuple[int, int, int] | None]:
        """What changes with a file."""
        return [_mark(path) for path in (self.ca, self.cert, self.key) if path is not None]

    def _read(self) -> Pems:
        ca = _bytes(self.ca)
        _parsed(ca, self.ca)
        if self.cert is None or self.key is None:
            return Pems(ca, None, None)
        cert, key = _bytes(self.cert), _bytes(self.key)
        warn_if_readable(self.key)
        _check_pair(cert, self.cert, key, self.key)
        return Pems(ca, cert, key)


def require_loopback(host: str, what: str, settings: CommonSettings) -> None:
    """Lets nothing be in clear between machines, unless that was asked for.

    Args:
        what: the beginning of the message, such as "the server binds 0.0.0.0".
    Raises:
        ConfigError: `host` is not of this machine.
    """
    if is_loopback(host):
        return
    if not settings.insecure:
        raise ConfigError(
            f"{what}, and there is no TLS: set QAQ_TLS_CERT, QAQ_TLS_KEY and QAQ_TLS_CA (`qaq certificates` makes "
            "them), or QAQ_INSECURE=1 to be open to that network"
        )
    if once(what):
        log.warning("without TLS: whoever reaches the network can read and change everything", reason=what)


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ctime_ns, found.st_ino, found.st_size


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); `qaq certificates` makes certificates") from error


def _parsed(pem: bytes, path: Path) -> x509.Certificate:
    """The first certificate of a file."""
    try:
        certificate = x509.load_pem_x509_certificates(pem)[0]
    except ValueError as error:
        raise ConfigError(f"{path} has no certificate in PEM form") from error
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc < now:
        raise ConfigError(f"the certificate {path} expired at {certificate.not_valid_after_utc}; renew it")
    if certificate.not_valid_before_utc > now:
        raise ConfigError(
            f"the certificate {path} holds from {certificate.not_valid_before_utc} on; set this machine's clock, or "
            "wait"
        )
    return certificate


def _check_pair(cert: bytes, cert_path: Path, key: bytes, key_path: Path) -> None:
    certificate = _parsed(cert, cert_path)
    try:
        private = load_pem_private_key(key, None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key_path} has no private key in PEM form without a passphrase") from error
    if private.public_key() != certificate.public_key():
        raise ConfigError(f"{key_path} is not the key of the certificate {cert_path}")
