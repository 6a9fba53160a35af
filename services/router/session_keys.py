"""Names of a session's keys in Redis."""

from __future__ import annotations

INDEX = "qaq:sessions"


def index(tenant: str) -> str:
    return f"{INDEX}:{tenant}"


def facts(identifier: str) -> str:
    return f"qaq:session:{identifier}"


def tokens(identifier: str) -> str:
    return f"qaq:session:{identifier}:tokens"


def pages(identifier: str) -> str:
    return f"qaq:session:{identifier}:pages"


def hold(identifier: str) -> str:
    return f"qaq:session:{identifier}:run"


def closed(identifier: str) -> str:
    """Says for a minute that a client closed the session: one that is missing without it, Redis has lost."""
    return f"qaq:session:{identifier}:closed"


def all_of(identifier: str) -> tuple[str, ...]:
    return tuple(key(identifier) for key in (facts, tokens, pages, hold))
