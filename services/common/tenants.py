"""The tenants file: who may call, with which keys, and how much. It has the hashes of keys, never a key.

docs/security.md shows one.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qaq_core.base.errors import ConfigError

PREFIX = "qaq_"
"""What keys begin with, so that one that was published by mistake can be found."""
KEY_BYTES = 32
MAX_FILE_BYTES = 1 << 20
MAX_TENANTS = 4096
MAX_KEYS = 64

Role = Literal["client", "operator"]
Limit = Annotated[int, Field(ge=1, le=10**12)]


class _Strict(BaseModel):
    # Errors do not repeat what was given: it may be a key that was written in place of its hash.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Quotas(_Strict):
    """What a tenant may use, over all routers together. None is unbounded.

    Attributes:
        tokens_per_minute: of prompts and answers.
        open_sessions: sessions that the tenant opened and that have neither been closed nor expired.
    """

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent_streams: Limit | None = None
    open_sessions: Annotated[int, Field(ge=1, le=10_000)] | None = None


class Tenant(_Strict):
    """A tenant. An operator's key may also list and close the sessions of all tenants.

    Attributes:
        keys: SHA-256 of each key, in hexadecimal.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    role: Role = "client"
    keys: Annotated[tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...], Field(max_length=MAX_KEYS)] = ()
    quotas: Quotas = Quotas()


class TenantsFile(_Strict):
    """What the file has. Names and keys occur once."""

    tenants: Annotated[tuple[Tenant, ...], Field(max_length=MAX_TENANTS)] = ()

    @model_validator(mode="after")
    def _each_occurs_once(self) -> TenantsFile:
        names = [tenant.name for tenant in self.tenants]
        if len(set(names)) < len(names):
            raise ValueError("two tenants have the same name")
        keys = [key for tenant in self.tenants for key in tenant.keys]
        if len(set(keys)) < len(keys):
            raise ValueError("a key occurs twice")
        return self


def hashed(key: str) -> str:
    """SHA-256 of a key, in hexadecimal. A key has 256 random bits, so that no slower hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def load(path: Path) -> TenantsFile:
    """Reads the file.

    Raises:
        ConfigError: it cannot be read, everybody may write it, it is too large or not valid. The message repeats
            nothing of its content.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"the tenants file {path} cannot be read ({error.strerror}); make one with `qaq key`"
        ) from None
    if mode & 0o002:
        raise ConfigError(
            f"everybody may write the tenants file {path}, and so become an operator; run chmod o-w {path}"
        )
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"the tenants file {path} is larger than {MAX_FILE_BYTES:,} bytes; remove tenants")
    try:
        return TenantsFile.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"the tenants file {path} is not valid: {place}: {first['msg']}") from None


def add_key(
    path: Path, name: str, *, role: Role | None = None, quotas: Quotas | None = None, replace: bool = False
) -> str:
    """Makes a key for a tenant and writes its hash to the file, which is made with mode 0600 if it is not there.

    Args:
        role: of a new tenant, `client` if None. An existing one must have it.
        quotas: those that are set take the place of the tenant's.
        replace: the tenant's other keys are removed.
    Returns:
        The key, which is nowhere else.
    Raises:
        ConfigError: the file, the name or the role does not fit.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    with FileLock(f"{path}.lock", mode=0o600):
        file = load(path) if path.exists() else TenantsFile()
        known = next((tenant for tenant in file.tenants if tenant.name == name), None)
        if known is not None and role is not None and role != known.role:
            raise ConfigError(f'the tenant "{name}" has the role {known.role}; choose another name, or edit {path}')
        kept = () if known is None or replace else known.keys
        limits = (known.quotas if known else Quotas()).model_dump() | (quotas or Quotas()).model_dump(exclude_none=True)
        fields = {
            "name": name,
            "role": known.role if known else role or "client",
            "keys": (*kept, hashed(key)),
            "quotas": limits,
        }
        try:
            changed = Tenant.model_validate(fields)
            others = tuple(tenant for tenant in file.tenants if tenant.name != name)
            _write(path, TenantsFile(tenants=(*others, changed)))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            raise ConfigError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
    return key


def _write(path: Path, file: TenantsFile) -> None:
    """Replaces the file at once, so that no router reads a half of it. Its mode stays."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w") as out:
            out.write(file.model_dump_json(indent=1, exclude_defaults=True) + "\n")
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
