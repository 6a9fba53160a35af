"""The keys of a stack of this machine: one of a client, one of an operator, and the tenants file of its router."""

from __future__ import annotations

import os
from pathlib import Path

from services.common import tenants
from services.common.tenants import Role

TENANTS: dict[Role, str] = {"client": "local", "operator": "operator"}


class StackKeys:
    """The files of a directory that only its owner can enter.

    Attributes:
        tenants: the tenants file, to which `qaq key` adds.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.tenants = directory, directory / "tenants.json"

    def path(self, role: Role) -> Path:
        """The file with the key of a role."""
        return self.directory / f"{role}.key"

    def key(self, role: Role) -> str:
        """Raises:
        OSError: there is none.
        """
        return self.path(role).read_text().strip()

    def make(self) -> None:
        """Makes the keys that are not there yet. Those of an earlier stack stay, and so do tenants that were added.

        Raises:
            ConfigError: the tenants file cannot be used.
        """
        known = tenants.load(self.tenants).tenants if self.tenants.exists() else ()
        valid = {key for tenant in known for key in tenant.keys}
        for role, name in TENANTS.items():
            if self.path(role).exists() and tenants.hashed(self.key(role)) in valid:
                continue
            key = tenants.add_key(self.tenants, name, role=role, replace=True)
            self.path(role).unlink(missing_ok=True)
            with open(os.open(self.path(role), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(key + "\n")
