"""Redis' users: one for each role, with the keys and commands that it needs.

The user `default` may do everything. It belongs to who runs the deployment.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qaq_core.base.errors import ConfigError
from services.common.private_files import write_private

User = Literal["router", "worker", "originals", "gateway", "operator", "client"]
USERS: tuple[User, ...] = get_args(User)

# No command that reaches keys without naming them, or other clients. Scripts have the rights of who runs them.
_COMMANDS = "-@all +@read +@write +@connection +@transaction -@dangerous -@admin -@blocking -scan -randomkey -dbsize"
# Not for those who only look up members: a script may keep Redis busy for ever.
_SCRIPTS = "+eval +evalsha +script|load +time"


@dataclass(frozen=True)
class Rights:
    """What a user may do.

    Attributes:
        keys: patterns of keys that it may read and write.
        announces: kinds of members as which it registers.
        finds: kinds of members that it looks up.
        commands: beyond those of all users.
    """

    keys: tuple[str, ...] = ()
    announces: tuple[str, ...] = ()
    finds: tuple[str, ...] = ()
    commands: str = ""


RIGHTS: Mapping[User, Rights] = {
    "router": Rights(("qaq:session*", "qaq:quota*"), ("router", "metrics"), ("worker",)),
    "worker": Rights((), ("worker", "metrics"), ("originals",)),
    # It counts the pages, and sees the names of other keys thereby, and how much memory there is.
    "originals": Rights(("qaq:page*", "qaq:codec*"), ("originals", "metrics"), (), "+scan +info"),
    "gateway": Rights((), ("gateway", "metrics"), ("router",)),
    "operator": Rights((), (), ("router", "worker", "originals", "gateway")),
    "client": Rights((), (), ("router",)),
}


def passwords() -> dict[str, str]:
    """A new password for `default` and every other user."""
    return {user: secrets.token_urlsafe(24) for user in ("default", *USERS)}


def acl(given: Mapping[str, str], version: tuple[int, ...]) -> str:
    """The text of Redis' ACL file, with hashes of the passwords.

    Args:
        given: passwords by user.
        version: of the server. Before 7.0 it cannot let a user read keys without letting it write them.
    """
    lines = [f"user default on #{_hash(given['default'])} ~* &* +@all"]
    for user in USERS:
        lines.append(f"user {user} on #{_hash(given[user])} resetchannels {_keys(RIGHTS[user], version)}")
        scripts = _SCRIPTS if RIGHTS[user].keys or RIGHTS[user].announces else ""
        lines[-1] += f" {_COMMANDS} {scripts} {RIGHTS[user].commands}".rstrip()
    return "\n".join(lines) + "\n"


def with_user(url: str, user: str, password: str) -> str:
    """A URL without a user, with one. `default` is named by its password alone."""
    scheme, rest = url.split("://", 1)
    return f"{scheme}://{'' if user == 'default' else user}:{password}@{rest}"


def write(directory: Path, url: str, version: tuple[int, ...]) -> None:
    """Chooses passwords and writes `redis/users.acl` and, for each user, `<user>/redis.env` with its QAQ_REDIS_URL.

    Raises:
        ConfigError: there are passwords already; the servers would know the old ones.
    """
    users = directory / "redis" / "users.acl"
    if users.exists():
        raise ConfigError(f"{users} is there already; remove it to choose new passwords")
    chosen = passwords()
    for user in (*chosen, "redis"):
        (directory / user).mkdir(parents=True, exist_ok=True, mode=0o700)
    for user, password in chosen.items():
        write_private(directory / user / "redis.env", f"QAQ_REDIS_URL={with_user(url, user, password)}\n".encode())
    write_private(users, acl(chosen, version).encode())


def _keys(rights: Rights, version: tuple[int, ...]) -> str:
    read = "%R~" if version >= (7,) else "~"
    own = [f"~{key}" for key in (*rights.keys, *_members(rights.announces))]
    return " ".join([*own, *(f"{read}{key}" for key in _members(rights.finds))])


def _members(kinds: tuple[str, ...]) -> list[str]:
    """The registry's keys of some kinds."""
    return [key for kind in kinds for key in (f"qaq:member:{kind}:*", f"qaq:members:{kind}")]


def _hash(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()
