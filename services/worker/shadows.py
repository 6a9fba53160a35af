"""The comparison of a session with full precision, for as long as somebody looks at it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import structlog
from qaq.v1 import inspect_pb2

from qaq_core.models import LoadedModel
from services.common import metrics
from services.common.errors import NotFound, ResourceExhausted, Unavailable
from services.common.precision import SHADOW_INTERVAL_S
from services.worker.methods import twin
from services.worker.scheduler.scheduler import Scheduler
from services.worker.session import Session
from services.worker.session_cache import Name
from services.worker.shadow import RECENT, Shadow

LEASE_S = SHADOW_INTERVAL_S + 5.0
"""A comparison ends when nobody has asked for it for so long. Views may have waited for each other."""
SHARE = 1 / 4
"""Of a worker's time that a comparison may take while it has streams."""
PAUSE_S = 0.05
"""Until the next look for new tokens."""
AT_REST_S = 15.0
"""After so long without a new token a session gives way to another one that is looked at."""
RETRY_S = 60.0
"""After a failure."""

Find = Callable[[Name], tuple[Session, bool]]
State = inspect_pb2.Shadow.State

log = structlog.get_logger()


class Shadows:
    """At most one `Shadow` at a time. Used by the event loop, but for what it gives the scheduler's thread to do.

    Args:
        find: a session, and whether it decodes or soon will. Raises NotFound.
        most_tokens: of a session that is compared; 0 compares none.
    """

    def __init__(self, scheduler: Scheduler, loaded: LoadedModel, find: Find, most_tokens: int) -> None:
        self._scheduler, self._loaded, self._find, self._most_tokens = scheduler, loaded, find, most_tokens
        self._model: Any = None
        self._name: Name | None = None
        self._until = self._active_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._shadow: Shadow | None = None
        self._session: Session | None = None
        self._failed: Name | None = None
        self._failed_at = 0.0

    def ask(self, name: Name, state: inspect_pb2.Shadow.State) -> None:
        """Somebody has looked at the comparison of a session, which begins if there is no other.

        Args:
            state: that `view` has told: what cannot be compared takes the place of nobody.
        """
        now = time.monotonic()
        if state in (State.STATE_TOO_LONG, State.STATE_FAILED):
            return
        if self._name is None:
            self._name, self._active_at = name, now
            self._task = asyncio.create_task(self._run(name), name="shadow")
        if self._name == name:
            self._until = now + LEASE_S
        elif now - self._active_at > AT_REST_S:
            self._until = 0.0

    def view(self, name: Name, session: Session) -> inspect_pb2.Shadow:
        """What is known of a session's comparison. In the scheduler's thread."""
        if len(session.tokens) > self._most_tokens:
            return inspect_pb2.Shadow(state=State.STATE_TOO_LONG)
        if self._failed == name and time.monotonic() - self._failed_at < RETRY_S:
            return inspect_pb2.Shadow(state=State.STATE_FAILED)
        if self._name not in (None, name):
            return inspect_pb2.Shadow(state=State.STATE_BUSY)
        shadow = self._shadow
        if shadow is None or session is not self._session:
            return inspect_pb2.Shadow(state=State.STATE_CATCHING_UP)
        last = list(shadow.compared)
        recent = last[-RECENT:]
        return inspect_pb2.Shadow(
            state=State.STATE_COMPARING if shadow.keeps_up else State.STATE_CATCHING_UP,
            cached=shadow.length,
            kv_bytes=shadow.nbytes,
            compared=shadow.count,
            missed=shadow.missed,
            kl_mean=shadow.kl_sum / max(1, shadow.count),
            kl_recent=sum(each.kl for each in recent) / max(1, len(recent)),
            kl_max=shadow.kl_max,
            same_top=shadow.agreed,
            same_top_recent=sum(each.same_top for each in recent),
            positions=[each.position for each in last],
            kl=[each.kl for each in last],
            same=[each.same_top for each in last],
        )

    # -- inside ----------------------------------------------------------------------------------------

    async def _run(self, name: Name) -> None:
        """Computes what comes of a session until nobody looks, or it cannot be compared any more."""
        try:
            if self._model is None:
                self._model = await asyncio.to_thread(twin, self._loaded.model)
            while time.monotonic() < self._until:
                try:
                    took = await asyncio.wrap_future(self._scheduler.between_steps(lambda: self._step(name)))
                except ResourceExhausted:  # much waits for the scheduler
                    took = 0.0
                if took is None:
                    return
                streams = self._scheduler.state.running
                await asyncio.sleep(took * (1 / SHARE - 1) if took and streams else 0.0 if took else PAUSE_S)
        except (NotFound, Unavailable):
            pass  # the session was closed, or the worker stops
        except Exception as error:  # the session itself goes on
            self._failed, self._failed_at = name, time.monotonic()
            log.warning("a session is no longer compared with full precision", reason=str(error)[:300], exc_info=True)
        finally:
            if self._session is not None:
                self._session.shadow = None
            self._name = self._shadow = self._session = None

    def _step(self, name: Name) -> float | None:
        """Computes the next tokens. In the scheduler's thread. Returns the seconds that it took, 0 for nothing; None if
        the session is too long."""
        began = time.monotonic()
        session, decodes = self._find(name)
        if len(session.tokens) > self._most_tokens:
            return None
        if self._shadow is None:
            self._shadow = Shadow(self._model)
        if session is not self._session:
            self._shadow.cut(0)  # its text may be another one
            self._session, session.shadow = session, self._shadow
        computed = self._shadow.step(session.tokens, flush=not decodes)
        if self._shadow.failed:
            raise RuntimeError(self._shadow.failed)
        metrics.shadow_tokens.inc(computed)
        now = time.monotonic()
        if computed or decodes:
            self._active_at = now
        return now - began if computed else 0.0
