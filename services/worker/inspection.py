"""Views of the caches of a worker, and the prices that callers set for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from qaq.v1 import inspect_pb2

from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache import CacheView
from qaq_core.models import LoadedModel
from services.common import precision
from services.common.errors import FailedPrecondition, NotFound, ResourceExhausted
from services.worker.cache_stats import cache_stats
from services.worker.generation import Generation
from services.worker.scheduler.scheduler import Scheduler
from services.worker.session import Session
from services.worker.session_cache import Name, session_name
from services.worker.shadows import Shadows
from services.worker.text import tokenizer_backend
from services.worker.vocabulary import Vocabulary

SHARE = 1 / 50
"""Of a worker's time that views may take."""
MAX_WAITING = 32
RETRY_AFTER_MS = 250

_View = inspect_pb2.CacheView


class Inspector:
    """Looks at sessions and sets their λ between two steps of the scheduler. Used by the event loop.

    Args:
        shadow_tokens: the longest session that is compared with full precision.
    """

    def __init__(self, scheduler: Scheduler, loaded: LoadedModel, shadow_tokens: int = 0) -> None:
        self._scheduler = scheduler
        self._shadows = Shadows(scheduler, loaded, self._tokens_come, shadow_tokens)
        self._vocabulary = Vocabulary(tokenizer_backend(loaded.tokenizer))
        self._configured = scheduler.budget
        self._turn, self._waiting = asyncio.Lock(), 0
        self._free_at = 0.0

    async def view(self, request: inspect_pb2.InspectRequest) -> _View:
        """What a session's cache holds. Calls wait for each other, so that all views keep to their share of the time.

        Raises:
            InvalidArgument: the options are out of range.
            NotFound: there is no cache of this session.
            ResourceExhausted: too many wait.
        """
        options = precision.options(request.options)
        if self._waiting >= MAX_WAITING:
            raise ResourceExhausted(
                "too many views wait for this worker; ask less often", retry_after_ms=RETRY_AFTER_MS
            )
        self._waiting += 1
        try:
            async with self._turn:
                await asyncio.sleep(self._free_at - time.monotonic())
                view, took = await asyncio.wrap_future(
                    self._scheduler.between_steps(lambda: self._look(request, *options))
                )
                self._free_at = time.monotonic() + took * (1 / SHARE - 1)
                if request.options.shadow:
                    self._shadows.ask((request.tenant, request.session_id), view.shadow.state)
                return view
        finally:
            self._waiting -= 1

    async def set_floor(self, request: inspect_pb2.SetFloorRequest) -> float:
        """Sets the least λ of a session, and returns it.

        Raises:
            InvalidArgument: it is out of range.
            NotFound: there is no cache of this session.
            FailedPrecondition: the preset is not elastic, or bits are asked for and nothing is packed.
        """
        precision.check(request)
        return await asyncio.wrap_future(self._scheduler.between_steps(lambda: self._price(request)))

    def set_budget(self, kv_bytes: int) -> None:
        """Sets what all caches may hold; 0 is what the worker was started with.

        Raises:
            InvalidArgument: it is out of range.
        """
        precision.budget(kv_bytes)
        self._scheduler.set_budget(kv_bytes or self._configured)

    # -- in the scheduler's thread ---------------------------------------------------------------------

    def _look(self, request: inspect_pb2.InspectRequest, tokens: int, columns: int) -> tuple[_View, float]:
        """A view, and the seconds of processor time that it took: on a busy machine others' time does not count."""
        began = time.thread_time()
        name = (request.tenant, request.session_id)
        session, phase = self._find(name)
        sequence = session.sequence
        if phase == _View.PHASE_IDLE:
            sequence.recover()
        view = _message(CacheView.of(sequence, tokens, columns))
        view.phase, view.total = phase, len(session.tokens)
        view.stats.CopyFrom(cache_stats(sequence.stats()))
        view.price.CopyFrom(self._prices(session))
        caches = [*self._scheduler.batch.sessions, *self._scheduler.sessions.idle]
        view.worker_kv_bytes = sum(each.sequence.nbytes for each in caches)
        view.worker_budget_bytes = self._scheduler.budget or 0
        if request.options.shadow:
            view.shadow.CopyFrom(self._shadows.view(name, session))
        if request.known_text >= 0:
            view.text_first = max(min(request.known_text, view.total), view.total - tokens)
            view.text.extend(self._text(session.tokens[view.text_first :]))
        return view, time.thread_time() - began

    def _price(self, request: inspect_pb2.SetFloorRequest) -> float:
        session, _ = self._find((request.tenant, request.session_id))
        memory, sequence, floor = self._scheduler.sessions.memory, session.sequence, request.lambda_floor
        if not sequence.rate.elastic:
            raise FailedPrecondition("the precision of this session's preset is fixed; only balanced can change it")
        if request.HasField("target_bits"):
            if not len(sequence.packed):
                raise FailedPrecondition("nothing is packed in this session yet; send a longer prompt first")
            floor = memory.floor_for(session, request.target_bits)
        memory.set_floor(session, floor)
        return floor

    def _find(self, name: Name) -> tuple[Session, _View.Phase]:
        """Raises:
        NotFound
        """
        batch, sessions = self._scheduler.batch, self._scheduler.sessions
        for generation in batch.active:
            if session_name(generation.request) == name and generation.session is not None and not generation.choice:
                return generation.session, _phase(generation, batch.preempted)
        idle = sessions.idle.peek(name)
        if idle is None:
            raise NotFound("this worker has no cache of the session")
        return idle, _View.PHASE_IDLE

    def _tokens_come(self, name: Name) -> tuple[Session, bool]:
        """A session, and whether it is about to get more tokens.

        Raises:
            NotFound
        """
        session, phase = self._find(name)
        return session, phase != _View.PHASE_IDLE

    def _prices(self, session: Session) -> inspect_pb2.Price:
        sequence = session.sequence
        price = inspect_pb2.Price(
            elastic=sequence.rate.elastic,
            own=sequence.rate.own or 0.0,
            session_floor=session.floor,
            worker_floor=self._scheduler.sessions.memory.lam,
            recovering=sequence.rate.recovering,
        )
        if len(sequence.packed):
            setattr(price, "lambda", sequence.rate.value)
            price.bits = price.own_bits = sequence.packed.mean_bits
            if sequence.rate.elastic and sequence.rate.floor:
                price.own_bits = sequence.bits_at(0.0)
        return price

    def _text(self, tokens: Sequence[int]) -> list[inspect_pb2.ViewedToken]:
        known = self._vocabulary
        return [
            inspect_pb2.ViewedToken(token_id=token, bytes=known.bytes_of(token), special=known.is_special(token))
            for token in tokens
        ]


def _phase(generation: Generation, preempted: Sequence[Generation]) -> _View.Phase:
    if generation in preempted:
        return _View.PHASE_PREEMPTED
    return _View.PHASE_PREFILL if generation.prefilling else _View.PHASE_DECODE


def _message(view: CacheView) -> _View:
    return _View(
        cached=view.length,
        exact_before=view.packed[0],
        exact_from=view.packed[1],
        first=view.first,
        key_bits=view.bits[KEY].tolist(),
        value_bits=view.bits[VALUE].tolist(),
        attention=view.attention.tolist(),
        asked=view.asked.tolist(),
        answered=view.answered.tolist(),
        layers=view.grids[KEY].shape[0],
        columns=view.grids[KEY].shape[1],
        key_grid=view.grids[KEY].tobytes(),
        value_grid=view.grids[VALUE].tobytes(),
    )
