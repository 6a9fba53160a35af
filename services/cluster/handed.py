"""What a server on another machine gets from the command that starts it: who it is, and where it listens.

Keys and certificates come as bytes and stay in memory: a server has them as files that have no name (Linux's memfd), so
nothing of them is left on a node, however its process ends.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from services.common.certificates import files
from services.common.identity import Pems, is_loopback
from services.common.roles import Role
from services.common.settings import CommonSettings

S = TypeVar("S", bound=CommonSettings)


@dataclass(frozen=True)
class Handed:
    """Goes with an actor, also when Ray starts it again on another node.

    Attributes:
        pems: its role's certificate, key and CA; None without TLS.
        tenants: of a router: the tenants file.
    """

    pems: Pems | None = None
    tenants: bytes | None = None

    @classmethod
    def of(cls, directory: Path | None, role: Role, tenants: bytes | None = None) -> Handed:
        """Those of a directory that `certificates.issue` wrote; None is without TLS."""
        if directory is None:
            return cls(None, tenants)
        ca, cert, key = (path.read_bytes() for path in files(directory, role))
        return cls(Pems(ca, cert, key), tenants)

    def placed(self, settings: S, node: str) -> S:
        """The settings of a server on the node with this address.

        It listens on the node's address, unless QAQ_HOST named another one than this machine's own.
        """
        changed: dict[str, Any] = {}
        if is_loopback(settings.host):
            changed["host"] = node
        elif settings.host in ("0.0.0.0", "::") and settings.advertise_host is None:
            changed["advertise_host"] = node
        if self.pems is not None:
            for name, pem in zip(("tls_ca", "tls_cert", "tls_key"), self.pems, strict=True):
                changed[name] = in_memory(name, pem or b"")
        if self.tenants is not None:
            changed["tenants_file"] = in_memory("tenants", self.tenants)
        return settings.model_copy(update=changed)


def in_memory(name: str, content: bytes) -> Path:
    """A file of this process alone, which ends with it."""
    descriptor = os.memfd_create(name)
    os.fchmod(descriptor, 0o600)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    return Path(f"/proc/self/fd/{descriptor}")
