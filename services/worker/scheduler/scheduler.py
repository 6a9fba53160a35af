"""The scheduler: one thread that computes all generations of a worker.

A step computes at most `prefill_chunk` prompt tokens, one prompt after the other, and then one token of every decoding
sequence in one forward pass. All methods but `submit`, `cancel`, `leave`, `drop`, `between_steps`, `state` and those
of the budget belong to the thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import structlog
import torch
from qaq.v1 import worker_pb2

from qaq_core import Originals
from qaq_core.models import LoadedModel
from services.common.errors import FailedPrecondition, Unavailable
from services.common.settings import WorkerSettings
from services.worker.call import Call
from services.worker.constraints import Grammar, Grammars
from services.worker.generation import Generation
from services.worker.replies import Replies
from services.worker.request import RequestValidator
from services.worker.scheduler.preemption import Preemption
from services.worker.scheduler.queue import RETRY_AFTER_MS, RequestQueue
from services.worker.scheduler.step import RunningBatch
from services.worker.scheduler.takeover import Takeover
from services.worker.session_cache import session_name
from services.worker.sessions import Sessions
from services.worker.state import WorkerState, summarize

T = TypeVar("T")

STORE_POLL_S = 0.005
STOP_TIMEOUT_S = 120.0

log = structlog.get_logger()


class Scheduler:
    """Runs generations until it is stopped.

    Args:
        loop: the event loop that reads the generations' replies.

    Attributes:
        grammars: compiles constraints for `submit`. Used by the event loop.
        methods: makes the methods of requests ready for `submit`. Used by the event loop, too.

    Raises:
        UnsupportedModelError, ConfigError: the default method does not fit the model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        originals: Originals,
        settings: WorkerSettings,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._originals, self._settings = originals, settings
        self._validator = RequestValidator(loaded, settings)
        self.grammars = Grammars(loaded, self._validator.vocabulary)
        self.sessions = Sessions(loaded, originals, settings)
        self.methods = self.sessions.methods
        self._queue, self._replies = RequestQueue(originals, settings), Replies(loop)
        self.batch = RunningBatch(
            loaded, self.sessions, self._replies, settings.decode_threads, settings.speculative_tokens
        )
        self._preemption = Preemption(self.batch, self.sessions)
        self._takeover = Takeover(self._queue, self.batch, self._replies)
        self._state = WorkerState()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    # -- for any thread --------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends every generation with UNAVAILABLE and waits at most `STOP_TIMEOUT_S` for the current step.

        Later calls do nothing.
        """
        if self._stopped:
            return
        self._stopped = True
        self.methods.close()
        self._queue.stop()
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("a step did not end in time; the scheduler's thread is abandoned", seconds=STOP_TIMEOUT_S)

    def drain(self, timeout_s: float) -> int:
        """Accepts nothing new, waits until all pages are stored, and stops. Other workers can then continue.

        Returns:
            the number of generations that ended with UNAVAILABLE.
        """
        self._queue.close()
        ends = time.monotonic() + timeout_s
        while self._originals.pending_bytes and time.monotonic() < ends:
            time.sleep(STORE_POLL_S)
        moved = self._state.running + self._state.waiting
        self.stop()
        return moved

    def check(self, request: worker_pb2.RunRequest) -> None:
        """Raises:
        InvalidArgument: names the field to change. Nothing costly has been done for the request yet.
        """
        self._validator.check(request)

    def submit(self, request: worker_pb2.RunRequest, grammar: Grammar | None = None) -> Generation:
        """Queues a generation. Its messages arrive in `Generation.replies`.

        Args:
            grammar: of the request's constraint, from `grammars`.
        Raises:
            InvalidArgument: names the field to change.
            Unavailable: the worker is draining or stopping.
            ResourceExhausted: the queue is full, or too many originals are pending.
        """
        generation = self._validator.generation(request, grammar)
        self._queue.put(generation, lambda: self._free_slots - len(self.batch.preempted))
        return generation

    def cancel(self, call: Call) -> None:
        """Frees its generation within one step. Does nothing if that has ended, or goes on for another call."""
        self._queue.cancel(call)

    def leave(self, call: Call) -> None:
        """Nobody reads the messages of a call any more. Its generation keeps its cache and waits for another call."""
        self._queue.leave(call)

    def drop(self, session_id: str, tenant: str = "") -> Future[bool]:
        """Frees a session's cache and ends its generation; False if the tenant has no such session."""
        return self._queue.drop((tenant, session_id))

    def between_steps(self, work: Callable[[], T]) -> Future[T]:
        """Does something short between two steps, when it may look at sessions and change them.

        Raises:
            ResourceExhausted: much waits already.
            Unavailable: the worker is stopping.
        """
        return self._queue.between_steps(work)

    @property
    def state(self) -> WorkerState:
        return self._state

    @property
    def budget(self) -> int | None:
        """Bytes that all caches may hold."""
        return self.sessions.memory.budget

    def set_budget(self, kv_bytes: int | None) -> None:
        """Changes the bytes that all caches may hold. λ follows within a few steps."""
        self.sessions.memory.budget = kv_bytes

    @property
    def _free_slots(self) -> int:
        """Slots for waiting and preempted generations."""
        return max(0, self._settings.max_sequences - self.batch.slots)

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while self._queue.wait_for_work(active=bool(self.batch.active)):
                try:
                    self._step()
                except Exception as error:  # a fault of the scheduler: all generations end, the thread continues
                    self._fail_all(error)
            self._fail_all(Unavailable("the worker stopped; send the request again", retry_after_ms=RETRY_AFTER_MS))
            self.sessions.idle.clear()
            self._drop_sessions()
            self._do_work()
            self._publish()

    def _step(self) -> None:
        self._drop_sessions()
        self._do_work()
        self._remove_cancelled()
        self._takeover.step()
        if self.sessions.memory.step(self.batch.sessions, self.sessions.idle):
            self._publish()
        self._preemption.step()
        self._admit()
        prefilled = self._prefill()
        decoding = self.batch.decoding
        if decoding:
            self.batch.decode(decoding)
        self._publish()
        if not prefilled and not decoding:
            self._queue.sleep(STORE_POLL_S)  # all prompts wait for the store, or all sequences for a call

    def _prefill(self) -> bool:
        """Computes at most `prefill_chunk` prompt tokens; False if no prompt was ready."""
        limit = left = self._settings.prefill_chunk
        while left > 0 and (generation := self.batch.next_prefill()):
            left -= self.batch.prefill(generation, left)
            self._publish()
            if self.batch.pack(generation):
                self._publish()
        return left < limit

    def _remove_cancelled(self) -> None:
        self._queue.remove_cancelled()
        for generation in [g for g in self.batch.active if g.cancelled]:
            self.batch.finish(generation)

    def _admit(self) -> None:
        """Starts generations in order of arrival while there is room: preempted ones first, then waiting ones."""
        while self._free_slots and not self._queue.staging_full:
            if self.batch.preempted:
                if not self._preemption.resume_first():
                    return
                continue
            candidate = self._queue.first(self.batch.busy_sessions)
            if candidate is None or candidate.slots > self._free_slots:
                return
            try:
                if not self.sessions.fits(candidate.request, candidate.slots, self.batch.sessions):
                    return
                self.batch.start(candidate)
            except Exception as error:
                self._replies.put(candidate, error)
            self._queue.remove(candidate)

    def _fail_all(self, error: Exception) -> None:
        """Ends all running, preempted and waiting generations."""
        for generation in self.batch.active:
            self.batch.fail(generation, error)
        for generation in self._queue.take_all():
            self._replies.put(generation, error)
        self._publish()

    def _drop_sessions(self) -> None:
        """Drops the sessions that callers of `drop` named. Publishes the state before it answers them."""
        dropped = []
        for name, answer in self._queue.take_drops():
            running = [g for g in self.batch.active if session_name(g.request) == name]
            for generation in running:
                self.batch.fail(generation, FailedPrecondition("the session was dropped; open a new one"))
            dropped.append((answer, self.sessions.idle.drop(name) or bool(running)))
        if dropped:
            self._publish()
        for answer, existed in dropped:
            if answer.set_running_or_notify_cancel():  # else its caller has gone away
                answer.set_result(existed)

    def _do_work(self) -> None:
        """What callers of `between_steps` asked for. An error is theirs."""
        for work, done in self._queue.take_work():
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

    def _publish(self) -> None:
        """Updates the state and sends the collected replies."""
        sessions = [*self.batch.sessions, *self.sessions.idle]
        waiting = len(self._queue) + len(self.batch.preempted)
        host = self.sessions.host_pages
        self._state = summarize(len(self.batch.running), waiting, sessions, host.nbytes if host else 0)
        self._replies.send()
