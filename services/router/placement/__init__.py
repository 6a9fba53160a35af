"""Which worker runs a generation. Policies are asked in order, one file each; the first that decides wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qaq_core.base.errors import ConfigError
from services.router.placement.affinity import SessionAffinity
from services.router.placement.base import C, Candidate, Policy
from services.router.placement.load import LeastLoaded
from services.router.placement.memory import LeastMemory
from services.router.placement.prefix import PrefixLocality
from services.router.sessions import Session

__all__ = ["Candidate", "Policy", "make", "place"]

POLICIES: dict[str, Callable[[], Policy]] = {
    "affinity": SessionAffinity,
    "prefix": PrefixLocality,
    "pressure": LeastMemory,
    "load": LeastLoaded,
}


def make(names: str) -> list[Policy]:
    """Policies by their names, with commas between them.

    Raises:
        ConfigError: one is not known.
    """
    unknown = [name for name in names.split(",") if name not in POLICIES]
    if unknown:
        raise ConfigError(f"no placement policy is called {unknown[0]!r}; there are {', '.join(POLICIES)}")
    return [POLICIES[name]() for name in names.split(",")]


def place(session: Session, prompt: Sequence[int], workers: Sequence[C], policies: Sequence[Policy]) -> C | None:
    """The worker for a session's next generation; None if there are none."""
    if not workers:
        return None
    choices = (policy.choose(session, prompt, workers) for policy in [*policies, LeastLoaded()])
    chosen = next(choice for choice in choices if choice is not None)
    for policy in policies:
        policy.placed(session, prompt, chosen.address)
    return chosen
