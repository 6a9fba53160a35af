"""Roles: who a process is, and which calls it may make.

A certificate names its role twice. The URI `qaq://role/<role>` tells a server who calls. The host name
`<role>.qaq.internal` tells a client whom it called, on whatever host that runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast, get_args

from services.common.errors import PermissionDenied

Role = Literal["router", "worker", "originals", "gateway", "operator", "client", "redis"]
"""operator: who runs the deployment. client: who may use it. redis: a server that QAQ only calls."""
ROLES: tuple[Role, ...] = get_args(Role)

_URI = "qaq://role/"
_CLIENTS: frozenset[Role] = frozenset({"client", "gateway", "operator"})

RIGHTS: Mapping[str, frozenset[Role]] = {
    "qaq.v1.Inference": _CLIENTS,
    "qaq.v1.Inspector": _CLIENTS,
    "vllm.grpc.engine.VllmEngine": _CLIENTS,
    "qaq.v1.Worker": frozenset({"router"}),
    "qaq.v1.Worker/Describe": frozenset({"router", "operator"}),
    "qaq.v1.Worker/Drain": frozenset({"operator"}),
    "qaq.v1.Originals": frozenset({"worker"}),
    "qaq.v1.Originals/Stats": frozenset({"worker", "operator"}),
}
"""Who may call a service, or one method of it, which then counts. What is not here may be called by nobody."""


def uri(role: Role) -> str:
    """The name of a role in a certificate, for servers."""
    return f"{_URI}{role}"


def server_name(role: Role | None) -> str:
    """The host name of a role in a certificate, for clients. None: that of any role."""
    return f"{role or 'any'}.qaq.internal"


def role_of(names: Iterable[str]) -> Role | None:
    """The role among a certificate's alternative names; None if there is not exactly one."""
    found = {name.removeprefix(_URI) for name in names if name.startswith(_URI)}
    role = found.pop() if len(found) == 1 else None
    return cast(Role, role) if role in ROLES else None


def may_call(role: Role | None, method: str) -> bool:
    """Whether a role may call `package.Service/Method`."""
    service = method.partition("/")[0]
    return role in RIGHTS.get(method, RIGHTS.get(service, frozenset()))


class Guard:
    """Checks the callers of one server.

    Args:
        certificates: callers show certificates. Otherwise they are clients, whoever they are.
    """

    def __init__(self, *, certificates: bool) -> None:
        self._certificates = certificates

    def check(self, path: str, context: Any) -> None:
        """Raises PermissionDenied if the caller may not call `/package.Service/Method`."""
        method = path.removeprefix("/")
        role = _caller(context) if self._certificates else "client"
        if not may_call(role, method):
            who = f"a certificate of the role {role}" if role else "a certificate without a role of QAQ"
            raise PermissionDenied(f"{who} may not call {method}; use one of a role that may, see docs/security.md")


def _caller(context: Any) -> Role | None:
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return role_of(name.decode(errors="replace") for name in names)
