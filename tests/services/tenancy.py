"""Two tenants and an operator with their keys, for routers that ask for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from qaq.v1 import generate_pb2_grpc

from services.common.keys import WithMetadata, authorization
from services.common.tenants import Quotas, add_key


@dataclass
class Tenancy:
    """A tenants file.

    Attributes:
        keys: by the tenant's name: "ada", "bob", and the operator "root"; "nobody" has one that is of no tenant.
    """

    path: Path
    keys: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("ada", "bob"):
            self.keys[name] = add_key(self.path, name)
        self.keys["root"] = add_key(self.path, "root", role="operator")
        self.keys["nobody"] = "qaq_" + "x" * 43

    def limit(self, name: str, **quotas: int) -> None:
        """Gives a tenant quotas, with one more key."""
        add_key(self.path, name, quotas=Quotas(**quotas))

    def renew(self, name: str) -> str:
        """A new key in place of a tenant's others."""
        self.keys[name] = add_key(self.path, name, replace=True)
        return self.keys[name]

    def stub(self, channel: grpc.aio.Channel, name: str) -> Any:
        """A client with the key of a tenant; without one for ""."""
        return WithMetadata(generate_pb2_grpc.InferenceStub(channel), authorization(self.keys.get(name, "")))
