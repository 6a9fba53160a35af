"""How the servers of a stack, and the commands that belong to it, reach each other: by role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, SecretStr

from services.common.certificates import files
from services.common.embedded_redis import EmbeddedRedis
from services.common.identity import Identity
from services.common.redis_users import User


class Access(BaseModel):
    """Redis' users and the certificates of a stack. It contains passwords.

    Attributes:
        redis: the argument of `EmbeddedRedis.attach`.
        certificates: the directory of all roles' certificates and keys; None if the stack uses no TLS.
        secret: of the workers and cache services.
    """

    redis: dict[str, Any]
    certificates: Path | None = None
    secret: str = Field(default="", repr=False)

    def settings(self, role: User) -> dict[str, Any]:
        """The part of a server's settings that says who it is."""
        given: dict[str, Any] = {"redis_url": EmbeddedRedis.attach(self.redis).url_of(role)}
        if role in ("worker", "originals"):
            # The secret file of the environment has been read: without this they would see both.
            given |= {"secret": SecretStr(self.secret), "secret_file": None}
        if self.certificates is not None:
            given |= dict(zip(("tls_ca", "tls_cert", "tls_key"), files(self.certificates, role), strict=True))
        return given

    def identity(self, role: User) -> Identity | None:
        """Who a command is when it calls the stack's servers."""
        return None if self.certificates is None else Identity(*files(self.certificates, role))
