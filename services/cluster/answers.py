"""What the actors of a stack answer, and waiting for it. This process must be connected to the stack's Ray."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from services.cluster.nodes import NAMESPACE
from services.cluster.state import StackError

START_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 30.0
HAND_OVER_S = 60.0
ASK_S = 10.0
POLL_S = 0.2

Report = Callable[[str, str, float | None], None]


def ask(names: Sequence[str], question: str, seconds: float = ASK_S) -> dict[str, Any]:
    """The answers of actors by name, without those that do not answer."""
    calls = {}
    for name in names:
        with contextlib.suppress(ValueError):  # it has ended
            calls[name] = getattr(ray.get_actor(name, namespace=NAMESPACE), question).remote()
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds) if calls else ([], [])
    answers = {}
    for name, reference in calls.items():
        with contextlib.suppress(ray.exceptions.RayError):
            if reference in done:
                answers[name] = ray.get(reference)
    return answers


def started(actors: Mapping[str, Any], report: Report) -> dict[str, str]:
    """Waits until all actors are up, and reports their progress. Returns their addresses by name.

    Raises:
        StackError: one did not start.
    """
    pending = {actor.address.remote(): name for name, actor in actors.items()}
    addresses: dict[str, str] = {}
    deadline = time.monotonic() + START_TIMEOUT_S
    while pending:
        done, _ = ray.wait(list(pending), timeout=POLL_S)
        for reference in done:
            name = pending.pop(reference)
            addresses[name] = _result(name, reference)
            report(name, f"serves at {addresses[name]}", 1.0)
        if time.monotonic() > deadline:
            late = ", ".join(pending.values())
            raise StackError(f"{late} did not start within {START_TIMEOUT_S:.0f} s; see `qaq logs`")
        _progress({name: actors[name] for name in pending.values()}, report)
    return addresses


def seen(workers: int, report: Report) -> None:
    """Waits until the router sees so many workers.

    Raises:
        StackError: it does not.
    """
    router, deadline = _router(), time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        report("router", "waiting for the workers", None)
        if ray.get(router.workers.remote()) >= workers:
            return
        time.sleep(POLL_S)
    raise StackError(f"the router does not see {workers} worker(s); see `qaq logs router`")


def served(model: str, report: Report) -> None:
    """Waits until the router serves a model.

    Raises:
        StackError: it cannot.
    """
    router, deadline = _router(), time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        report("router", f"loading the tokenizer of {model}", None)
        why = ray.get(router.serves.remote(model), timeout=START_TIMEOUT_S)
        if why == "":
            report("router", f"serves {model}", 1.0)
            return
        if why:
            raise StackError(why)
        time.sleep(POLL_S)
    raise StackError(f"the router does not see a worker of {model}; see `qaq logs router`")


def handed_over(name: str) -> int:
    """The number of generations that a worker has handed over.

    Raises:
        StackError: it has not.
    """
    reference = ray.get_actor(name, namespace=NAMESPACE).hand_over.remote()
    try:
        return int(ray.get(reference, timeout=HAND_OVER_S))
    except ray.exceptions.RayError as error:
        raise StackError(
            f"{name} was stopped before it had handed over what it ran ({type(error).__name__}): its streams go on "
            "elsewhere once their routers notice"
        ) from error


def retired(names: Sequence[str], patience_s: float) -> bool:
    """Whether workers have finished what was accepted for their model, see `WorkerServer.retire`."""
    calls = []
    for name in names:
        with contextlib.suppress(ValueError):  # it has ended
            calls.append(ray.get_actor(name, namespace=NAMESPACE).retire.remote(patience_s))
    done, late = ray.wait(calls, num_returns=len(calls), timeout=patience_s + ASK_S) if calls else ([], [])
    finished = not late
    for call in done:
        try:
            finished &= bool(ray.get(call))
        except ray.exceptions.RayError:  # its process died
            finished = False
    return finished


def _router() -> Any:
    return ray.get_actor("router", namespace=NAMESPACE)


def _progress(waiting: Mapping[str, Any], report: Report) -> None:
    """Reports the progress of each actor. One that is still importing cannot answer."""
    calls = {name: actor.progress.remote() for name, actor in waiting.items()}
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=POLL_S) if calls else ([], [])
    for name, reference in calls.items():
        with contextlib.suppress(ray.exceptions.RayError):  # `address` raises the error
            if reference in done:
                report(name, *ray.get(reference))


def _result(name: str, reference: Any) -> str:
    try:
        return str(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        raise StackError(f"{name} did not start: {error.cause or error}") from error
    except ray.exceptions.RayError as error:
        raise StackError(
            f"{name} did not start: its process died ({type(error).__name__}); see `qaq logs {name}`"
        ) from error
