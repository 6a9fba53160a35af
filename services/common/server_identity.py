"""The identity that a server gets from its settings."""

from __future__ import annotations

from collections.abc import Mapping

from qaq_core.base.errors import ConfigError
from services.common.identity import Identity, require_loopback
from services.common.own_certificate import check_own
from services.common.redis_url import hosts_of
from services.common.roles import Role
from services.common.settings import CommonSettings, GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings

_ROLES: Mapping[type[CommonSettings], Role] = {
    RouterSettings: "router",
    WorkerSettings: "worker",
    OriginalsSettings: "originals",
    GatewaySettings: "gateway",
}


def identity(settings: CommonSettings) -> Identity | None:
    """The identity of a server; None if it has none, which only a server on loopback may.

    Raises:
        ConfigError: the files are missing or cannot be used, the certificate is of another role or another CA, or the
            server would talk in clear with other machines.
    """
    files = {name: getattr(settings, name) for name in ("tls_ca", "tls_cert", "tls_key")}
    missing = [name for name, path in files.items() if path is None]
    if not missing:
        who = Identity(settings.tls_ca, settings.tls_cert, settings.tls_key)  # type: ignore[arg-type]
        check_own(who, _ROLES.get(type(settings)))
        return who
    if len(missing) < len(files):
        given = ", ".join(f"QAQ_{name.upper()}" for name in missing)
        raise ConfigError(f"a server needs tls_cert, tls_key and tls_ca together; set {given} too")
    require_loopback(settings.host, f"the server binds {settings.host}", settings)
    url = settings.redis_url.get_secret_value()
    if not url.startswith("rediss"):
        for host in hosts_of(url):
            require_loopback(host, f"Redis is at {host} without rediss://", settings)
    return None
