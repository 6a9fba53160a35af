"""The sessions of a worker: opened for a generation, kept for the next turn, evicted when memory is short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qaq.v1 import common_pb2, worker_pb2

from qaq_core import Method, Originals
from qaq_core.models import LoadedModel
from qaq_core.storage import HostPages
from services.common.errors import ResourceExhausted
from services.common.settings import WorkerSettings
from services.worker.memory_controller import MemoryController
from services.worker.methods import Methods
from services.worker.session import Session, page_salt
from services.worker.session_cache import SessionCache, session_name
from services.worker.traced import traced

if TYPE_CHECKING:
    from opentelemetry.context import Context


class Sessions:
    """Opens sessions and keeps idle ones. Used by the scheduler's thread alone.

    Attributes:
        methods: made ready by another thread before `open`.
        idle: sessions between two turns.
        memory: the budget of all caches.
        host_pages: originals that stay in host memory for exceptions in time.

    Raises:
        UnsupportedModelError, ConfigError: the worker's default method does not fit the model.
    """

    def __init__(self, loaded: LoadedModel, originals: Originals, settings: WorkerSettings) -> None:
        self._originals, self._settings = originals, settings
        self._fingerprint = loaded.identity
        self.host_pages = HostPages(settings.host_cache_bytes) if settings.exceptions == "in-time" else None
        self.methods = Methods(loaded, settings)
        self.methods.get(common_pb2.CacheParams())
        self.idle = SessionCache(settings.max_idle_sessions)
        self.memory = MemoryController(settings.kv_budget_bytes, settings.kv_min_bits, settings.recovery_bytes_per_s)

    def open(self, request: worker_pb2.RunRequest, tokens: list[int], trace: Context | None = None) -> Session:
        """The session of a request: the idle one if its cache continues in `tokens`, a fork of the session that
        `branch_of` names, or a new one.

        Args:
            trace: that its calls of the store belong to.
        Raises:
            ConfigError: the request has an unknown preset, or a target out of range.
        """
        session = self._open(request, tokens, trace)
        session.floor = request.lambda_floor
        return session

    def _open(self, request: worker_pb2.RunRequest, tokens: list[int], trace: Context | None) -> Session:
        method = self.methods.get(request.cache)
        session = self.idle.take(session_name(request))
        if session is not None:
            if session.continues_in(tokens, method):
                session.resume(tokens)
                session.follow(trace)
                return session
            session.close()
        origin = self.idle.peek((request.tenant, request.branch_of))
        if origin is not None and origin.continues_in(tokens, method):
            branch = origin.fork()
            branch.resume(tokens)
            branch.follow(trace)
            return branch
        settings = self._settings
        tenant = "" if settings.prefix_sharing == "all" else request.tenant
        salt = page_salt(settings.secret.get_secret_value(), tenant)
        originals, wait = traced(self._originals), settings.requantize_wait
        session = Session(method, originals, self._fingerprint, tokens, salt, wait, self.host_pages)
        session.follow(trace)
        if settings.prefix_reuse:
            session.load(request.page_ids, self._recomputed(method), settings.prefix_timeout_s)
        return session

    def preempt(self, session: Session) -> None:
        """Frees the cache of a session that will be restored."""
        session.preempt(self.memory.min_bytes(session))

    def restore(self, session: Session) -> None:
        """Begins to load the stored pages of a preempted session."""
        if self._settings.prefix_reuse:
            session.restore(self._recomputed(session.method), self._settings.prefix_timeout_s)

    def _recomputed(self, method: Method) -> int:
        """Last tokens of a log that are computed even if they are stored, for the attention of their queries."""
        return self._settings.prefix_recompute_tokens if method.attentive else 1

    def close(self, request: worker_pb2.RunRequest, session: Session) -> None:
        """Ends the use of a session. It stays in the session cache if the request says so and its cache is complete."""
        if request.keep and request.session_id and not session.prefilling:
            self.idle.put(session_name(request), session)
        else:
            session.close()

    def fits(self, request: worker_pb2.RunRequest, choices: int, running: Sequence[Session]) -> bool:
        """Whether a generation fits beside the running ones now. Evicts idle sessions to make room.

        Raises:
            ConfigError: the request has an unknown preset, or a target out of range.
            ResourceExhausted: it does not fit even alone.
        """
        need = choices * self.memory.predict(self.methods.get(request.cache), len(request.token_ids))
        if self.memory.budget is not None and need > self.memory.budget:
            raise ResourceExhausted(
                f"a prompt of {len(request.token_ids)} tokens needs at least {need:,} bytes of cache and this "
                f"worker has {self.memory.budget:,}; shorten the prompt or raise QAQ_KV_BUDGET_BYTES"
            )
        return self.memory.fits(need, running, self.idle)
