"""The stack that a command means: that of this machine, or the one on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from services.cluster.state import StackState

Address = Annotated[
    str | None,
    typer.Option(help="The Ray cluster on which the stack runs, see `qaq up`; default: the stack started here."),
]


def where(address: str | None) -> StackState | str:
    """The address of a Ray cluster, or the stack that was started here.

    Raises:
        StackError: there is none.
    """
    return address or running()


def running_or(found: StackState | None) -> StackState:
    """A stack that was found, or the one that was started here.

    Raises:
        StackError: there is none.
    """
    return found if found is not None else running()


def running() -> StackState:
    """The stack that was started here.

    Raises:
        StackError: there is none, or its process has died.
    """
    from services.cluster import claim, state
    from services.cluster.state import StackError

    running = state.load()
    owner = running or claim.current()
    if owner is None:
        last = f" (the last one ended by itself: {why})" if (why := state.why_it_ended()) else ""
        raise StackError(f"no stack is running{last}; start one with `qaq up`")
    if running is None and owner.alive:
        raise claim.taken(owner)
    if running is None or not running.alive:
        raise StackError("the stack's process has died; clean up with `qaq down`, then `qaq up`")
    return running
