"""The sessions of a worker: opened for a generation, kept for the next turn, freed when room is needed."""

from __future__ import annotations

from collections.abc import Sequence

from qaq.v1 import common_pb2, worker_pb2

from qaq_core import Originals
from qaq_core.models import LoadedModel
from services.common.errors import ResourceExhausted
from services.common.settings import WorkerSettings
from services.worker.memory_controller import MemoryController
from services.worker.methods import Methods
from services.worker.session import Session, page_salt
from services.worker.session_cache import SessionCache


class Sessions:
    """Makes sessions, and keeps those between two turns. Belongs to one thread.

    Raises:
        UnsupportedModelError, ConfigError: the worker's default method does not fit the model.
    """

    def __init__(self, loaded: LoadedModel, originals: Originals, settings: WorkerSettings) -> None:
        self._originals, self._settings = originals, settings
        self._fingerprint = loaded.identity
        self.methods = Methods(loaded, settings)
        self.methods.get(common_pb2.CacheParams())
        self.cache = SessionCache(settings.max_idle_sessions)
        self.memory = MemoryController(settings.kv_budget_bytes, settings.kv_floor_bits, settings.widen_bytes_per_s)

    def open(self, request: worker_pb2.RunRequest, tokens: list[int]) -> Session:
        """The session of a request: as it was left, if its cache is of use for `tokens`, or a new one.

        Raises:
            ConfigError: the request names an unknown preset, or a target out of range.
        """
        method = self.methods.get(request.cache)
        session = self.cache.take(request.session_id)
        if session is not None:
            if session.continues_in(tokens, method):
                session.resume(tokens)
                return session
            session.close()
        origin = self.cache.look(request.branch_of)
        if origin is not None and origin.continues_in(tokens, method):
            branch = origin.fork()
            branch.resume(tokens)
            return branch
        settings = self._settings
        tenant = "" if settings.prefix_sharing == "all" else request.tenant
        salt = page_salt(settings.tenant_salt.get_secret_value(), tenant)
        session = Session(method, self._originals, self._fingerprint, tokens, salt, settings.requantize_wait)
        if settings.prefix_reuse:
            session.load(request.page_ids, settings.prefix_rest, settings.prefix_timeout_s)
        return session

    def pause(self, session: Session) -> None:
        """Frees the cache of a session that will come back."""
        session.pause(self.memory.least(session))

    def restore(self, session: Session) -> None:
        """Begins the cache of a session that was paused with what is stored of it."""
        if self._settings.prefix_reuse:
            session.restore(self._settings.prefix_rest, self._settings.prefix_timeout_s)

    def leave(self, request: worker_pb2.RunRequest, session: Session) -> None:
        """A generation ended: keeps its session if that was asked and its cache is whole."""
        if request.keep and request.session_id and not session.prefilling:
            self.cache.put(request.session_id, session)
        else:
            session.close()

    def fits(self, request: worker_pb2.RunRequest, choices: int, running: Sequence[Session]) -> bool:
        """Whether there is room for a generation; idle sessions are freed for it. False: there will be, later.

        Raises:
            ConfigError: the request names an unknown preset, or a target out of range.
            ResourceExhausted: it would not fit if it were alone.
        """
        need = choices * self.memory.predict(self.methods.get(request.cache), len(request.token_ids))
        if self.memory.budget is not None and need > self.memory.budget:
            raise ResourceExhausted(
                f"a prompt of {len(request.token_ids)} tokens takes at least {need:,} bytes of cache and this "
                f"worker has {self.memory.budget:,}; shorten it, or raise QAQ_KV_BUDGET_BYTES"
            )
        return self.memory.fits(need, running, self.cache)
