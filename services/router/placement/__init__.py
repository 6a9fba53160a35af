"""Placement: which worker runs a generation. The policies, one file each, are asked in order; the first choice wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qaq_core.base.errors import ConfigError
from services.router.placement.affinity import SessionAffinity
from services.router.placement.base import C, Candidate, Policy
from services.router.placement.load import LeastLoaded
from services.router.placement.memory import LeastMemory
from services.router.placement.prefix import PrefixLocality
from services.router.session import Session

__all__ = ["Candidate", "Policy", "make", "place"]

POLICIES: dict[str, Callable[[], Policy]] = {
    "affinity": SessionAffinity,
    "prefix": PrefixLocality,
    "memory": LeastMemory,
    "load": LeastLoaded,
}


def make(names: str) -> list[Policy]:
    """The policies of a comma-separated list of names.

    Raises:
        ConfigError: a name is unknown.
    """
    unknown = [name for name in names.split(",") if name not in POLICIES]
    if unknown:
        raise ConfigError(f"placement policy {unknown[0]!r} is unknown; use some of {', '.join(POLICIES)}")
    return [POLICIES[name]() for name in names.split(",")]


def place(session: Session, prompt: Sequence[int], workers: Sequence[C], policies: Sequence[Policy]) -> C | None:
    """The worker for a session's next generation; None if there are no workers."""
    if not workers:
        return None
    choices = (policy.choose(session, prompt, workers) for policy in [*policies, LeastLoaded()])
    chosen = next(choice for choice in choices if choice is not None)
    for policy in policies:
        policy.placed(session, prompt, chosen.address)
    return chosen
