"""Addresses as settings and options give them: what is wrong with one is said before it is used."""

from __future__ import annotations

import ipaddress
import re

from qaq_core.base.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?")


def check_host(host: str) -> str:
    """A host name or an IP address, alone.

    Raises:
        ConfigError: it is something else, such as a URL or host:port.
    """
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        if not _NAME.fullmatch(host):
            raise ConfigError(f"{host!r} is no host name or IP address; give it without a scheme and a port") from None
    return host


def check_address(address: str) -> str:
    """host:port; an IPv6 address is in brackets.

    Raises:
        ConfigError: it is something else.
    """
    host, _, port = address.rpartition(":")
    bare_ipv6 = ":" in host and not host.startswith("[")
    if not host or bare_ipv6 or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is no address; give host:port, such as 127.0.0.1:7700 or [::1]:7700")
    check_host(host)
    return address


def check_addresses(addresses: str) -> list[str]:
    """Several, separated by commas; an empty text is refused.

    Raises:
        ConfigError: one is no address.
    """
    return [check_address(address.strip()) for address in addresses.split(",")]


def is_local(host: str) -> bool:
    """Whether a host name or address is of this machine and cannot be reached from others."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
