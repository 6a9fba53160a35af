"""The secret of a deployment: the keys that are made of it, and where it may be left out."""

from __future__ import annotations

import structlog
from blake3 import blake3

from qaq_core.base.errors import QAQError
from services.common.identity import is_loopback
from services.common.log import once
from services.common.private_files import warn_if_readable
from services.common.redis_url import hosts_of
from services.common.settings import PageSettings

log = structlog.get_logger()


class SecretMissingError(QAQError):
    """A role that others can reach has no secret. The message says how to set it."""


def derive_key(secret: str, purpose: str) -> bytes:
    """A key of 32 bytes. Keys for different purposes say nothing about each other or the secret."""
    return blake3(secret.encode(), derive_key_context=f"qaq {purpose}").digest()


def check_secret(settings: PageSettings) -> None:
    """Warns if a role has no secret, which is for one machine alone.

    Raises:
        SecretMissingError: it binds or uses an address that is not loopback.
    """
    if settings.secret_file is not None:
        warn_if_readable(settings.secret_file)
    if settings.secret.get_secret_value():
        return
    hosts = [settings.host, settings.advertise_host, *hosts_of(settings.redis_url.get_secret_value())]
    outside = [host for host in hosts if host and not is_loopback(host)]
    if outside:
        raise SecretMissingError(
            f"{outside[0]} is not a loopback address: give every worker and cache service the same secret by "
            "QAQ_SECRET or QAQ_SECRET_FILE"
        )
    if once("no secret"):
        log.warning(
            "QAQ_SECRET is not set: whoever reaches Redis or a cache service on this machine can find out what was "
            "sent, and forge pages"
        )
