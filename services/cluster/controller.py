"""The controller of a stack: a small actor that changes it, one change at a time, for commands on any machine.

It supervises nothing: Ray starts actors again, and Ray's table of named actors is the record of what is wanted. So a
controller that is started again goes on with the workers that there are.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from services.cluster.handed import Handed
from services.cluster.nodes import NAMESPACE, Request
from services.cluster.state import StackError, StackSettings
from services.common.roles import Role

if TYPE_CHECKING:
    from services.cluster.roles import Plan
    from services.cluster.survey import Survey

NAME = "controller"
POLL_S = 0.2
ANSWER_S = 15.0
_ASKS = 4  # threads for questions, which are answered while changes wait for each other
_CHANGES = 16

Report = Callable[[str, str, float | None], None]
T = TypeVar("T")


class Controller:
    """Starts a stack's servers and changes how many there are and where.

    Args:
        settings, plan, directory, handed: see `Launcher`. Those on other machines get `handed`, and it calls as the
            operator with the operator's.
    """

    def __init__(
        self,
        settings: StackSettings,
        plan: Plan,
        directory: Path | None = None,
        handed: Mapping[Role, Handed] | None = None,
    ) -> None:
        from services.cluster.autoscaler import Autoscaling
        from services.cluster.launcher import Launcher

        self._launcher = Launcher(settings, plan, self._report, directory, handed)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._launcher.go_on()
        self._plan, self._handed = plan, handed
        self._changing = threading.Lock()
        self._said: dict[str, tuple[str, float | None]] = {}
        self._autoscaling = Autoscaling(self._launcher, self._change)
        threading.Thread(target=self._autoscaling.run, name="autoscaling", daemon=True).start()

    @ray.method(concurrency_group="changes")
    def start(self) -> dict[str, str]:
        """See `Launcher.start_all`."""
        return self._change(self._launcher.start_all)

    @ray.method(concurrency_group="changes")
    def scale(self, workers: int, model: str = "", most: int | None = None) -> None:
        """See `Launcher.scale`."""
        self._change(lambda: self._launcher.scale(workers, model, most))

    @ray.method(concurrency_group="changes")
    def add(self, model: str, workers: int, changes: Mapping[str, Any]) -> str:
        """See `Launcher.add`."""
        return self._change(lambda: self._launcher.add(model, workers, changes))

    @ray.method(concurrency_group="changes")
    def remove(self, model: str, patience_s: float) -> bool:
        """See `Launcher.remove`."""
        return self._change(lambda: self._launcher.remove(model, patience_s))

    @ray.method(concurrency_group="changes")
    def drain(self, where: str) -> int:
        """See `Launcher.drain`."""
        return self._change(lambda: self._launcher.drain(where))

    @ray.method(concurrency_group="changes")
    def restart(self) -> int:
        """See `Launcher.restart`."""
        return self._change(self._launcher.restart)

    @ray.method(concurrency_group="questions")
    def progress(self) -> dict[str, tuple[str, float | None]]:
        """What was said last of each server that starts or stops, while something changes."""
        return dict(self._said)

    @ray.method(concurrency_group="questions")
    def survey(self) -> Survey:
        """What runs where, see `survey.take`. Not of a stack of one machine."""
        from services.cluster import survey

        assert self._handed is not None
        return survey.take(self._launcher, self._plan, self._handed["operator"])

    @ray.method(concurrency_group="questions")
    def scaled(self) -> dict[str, str]:
        """By model, what followed its load last; and what its number of workers may be, if that follows it."""
        fleets = self._launcher.elastic
        return {
            fleet.name: f"{fleet.least} to {fleet.most} workers, {fleet.served.workers} now; "
            + self._autoscaling.last.get(fleet.name, "not changed yet")
            for fleet in fleets
        }

    @ray.method(concurrency_group="questions")
    def stop(self) -> None:
        """Nothing: what it has started is stopped by who stops it."""

    def _change(self, what: Callable[[], T]) -> T:
        if not self._changing.acquire(blocking=False):
            self._report("stack", "waiting for another command that changes it", None)
            self._changing.acquire()
        try:
            self._said.clear()
            return what()
        finally:
            self._changing.release()

    def _report(self, name: str, stage: str, part: float | None) -> None:
        self._said[name] = stage, part


def launch(
    settings: StackSettings,
    plan: Plan,
    directory: Path | None = None,
    handed: Mapping[Role, Handed] | None = None,
) -> Any:
    """Creates the controller of the stack of the Ray cluster to which this process is connected."""
    remote: Any = ray.remote(concurrency_groups={"changes": _CHANGES, "questions": _ASKS})(Controller)
    options = remote.options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        **Request().options(),
    )
    return options.remote(settings, plan, directory, handed)


def find() -> Any:
    """The controller of the stack of the Ray cluster to which this process is connected.

    Raises:
        StackError: there is none.
    """
    try:
        return ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError as error:
        raise StackError("no stack of QAQ runs on this Ray cluster; start one with `qaq up --address`") from error


def call(controller: Any, method: str, *arguments: Any, report: Report) -> Any:
    """Calls a method of the controller that changes the stack, and reports what is said meanwhile.

    Raises:
        StackError: the method raised one, or the controller's process ended.
    """
    reference = getattr(controller, method).remote(*arguments)
    last: dict[str, tuple[str, float | None]] = {}
    while not ray.wait([reference], timeout=POLL_S)[0]:
        said: dict[str, tuple[str, float | None]] = {}
        with contextlib.suppress(ray.exceptions.RayError):
            said = ray.get(controller.progress.remote(), timeout=ANSWER_S)
        for name, (stage, part) in said.items():
            if last.get(name) != (stage, part):
                report(name, stage, part)
        last = said
    return answer(reference)


def answer(reference: Any, seconds: float | None = None) -> Any:
    """What a method of the controller returns.

    Raises:
        StackError: see `call`; or there is no answer within the seconds.
    """
    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause or error
        raise StackError(str(cause)) from error
    except ray.exceptions.RayError as error:
        raise StackError(
            f"the stack's controller does not answer ({type(error).__name__}); look with `qaq status`, and try again"
        ) from error


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """This process is connected to the Ray cluster at an address, host:port or ray://host:port.

    Raises:
        StackError: it cannot be.
    """
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    except Exception as error:
        raise StackError(f"Ray at {address} does not answer ({_first_line(error)})") from error
    try:
        yield
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
