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
        self._until = 0.0
        self._task: asyncio.Task[None] | None = None
        self._shadow: Shadow | None = None
        self._session: Session | None = None
        self._failed = False

    def ask(self, name: Name) -> None:
        """Somebody looks at the comparison of a session, which begins if there is no other."""
        if self._name is None:
            self._name, self._failed = name, False
            self._task = asyncio.create_task(self._run(name), name="shadow")
        if self._name == name:
            self._until = time.monotonic() + LEASE_S

    def view(self, name: Name, session: Session) -> inspect_pb2.Shadow:
        """What is known of a session's comparison. In the scheduler's thread."""
        if len(session.tokens) > self._most_tokens:
            return inspect_pb2.Shadow(state=State.STATE_TOO_LONG)
        if self._name != name:
            return inspect_pb2.Shadow(state=State.STATE_BUSY)
        if self._failed:
            return inspect_pb2.Shadow(state=State.STATE_FAILED)
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
        """Computes what comes of a session until nobody looks, or there is no such session."""
        try:
            if self._model is None and self._most_tokens:
                self._model = await asyncio.to_thread(twin, self._loaded.model)
            while time.monotonic() < self._until:
                pause = PAUSE_S
                if self._most_tokens and not self._failed:
                    try:
                        took = await asyncio.wrap_future(self._scheduler.between_steps(lambda: self._step(name)))
                    except ResourceExhausted:  # much waits for the scheduler
                        took = 0.0
                    streams = self._scheduler.state.running
                    pause = took * (1 / SHARE - 1) if took and streams else 0.0 if took else PAUSE_S
                await asyncio.sleep(pause)
        except (NotFound, Unavailable):
            pass  # the session was closed, or the worker stops
        finally:
            if self._session is not None:
                self._session.shadow = None
            self._name = self._shadow = self._session = None

    def _step(self, name: Name) -> float:
        """Computes the next tokens. In the scheduler's thread. Returns the seconds that it took; 0 for nothing."""
        began = time.monotonic()
        session, decodes = self._find(name)
        if len(session.tokens) > self._most_tokens:
            session.shadow = self._shadow = None
            return 0.0
        if self._shadow is None:
            self._shadow = Shadow(self._model)
        if session is not self._session:
            self._session, session.shadow = session, self._shadow
        try:
            computed = self._shadow.step(session.tokens, flush=not decodes)
        except Exception as error:  # the session itself goes on
            log.warning("a session is no longer compared with full precision", reason=str(error)[:300], exc_info=True)
            session.shadow = self._shadow = None
            self._failed = True
            return 0.0
        metrics.shadow_tokens.inc(computed)
        return time.monotonic() - began if computed else 0.0
