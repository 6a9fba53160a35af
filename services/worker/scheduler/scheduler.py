"""The engine: one thread that computes, for all generations of a worker.

A step is at most `prefill_chunk` tokens of prompts, one prompt after the other, and then one token of every
sequence that decodes, in one forward pass. Everything but `submit`, `cancel`, `drop` and `state` belongs to the
thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future

import structlog
import torch
from qaq.v1 import worker_pb2

from qaq_core import Originals
from qaq_core.models import LoadedModel
from services.common.errors import FailedPrecondition, Unavailable
from services.common.settings import WorkerSettings
from services.worker.generation import Generation
from services.worker.replies import Replies
from services.worker.request import Checker
from services.worker.scheduler.preemption import Preemption
from services.worker.scheduler.queue import RETRY_AFTER_MS, RequestQueue
from services.worker.scheduler.step import RunningBatch
from services.worker.sessions import Sessions
from services.worker.state import State, observe

STORE_POLL_S = 0.005
STOP_S = 120.0

log = structlog.get_logger()


class Scheduler:
    """Runs generations until it is stopped.

    Args:
        loop: the event loop that reads the generations' replies.
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
        self._check = Checker(loaded, settings)
        self.sessions = Sessions(loaded, originals, settings)
        self._queue, self._replies = RequestQueue(originals, settings), Replies(loop)
        self.batch = RunningBatch(loaded, self.sessions, self._replies, settings.decode_threads)
        self._preemption = Preemption(self.batch, self.sessions)
        self._state = State()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- for any thread --------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends every generation with UNAVAILABLE and waits at most STOP_S for the thread. Does nothing again."""
        if self._stopped:
            return
        self._stopped = True
        self._queue.stop()
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            log.error("a step does not end; going on without it", seconds=STOP_S)

    def drain(self, patience_s: float) -> int:
        """Takes nothing new, waits for the store to have what was computed, and stops. Others go on from there.

        Returns:
            how many generations ended with UNAVAILABLE for that.
        """
        self._queue.close()
        ends = time.monotonic() + patience_s
        while self._originals.pending_bytes and time.monotonic() < ends:
            time.sleep(STORE_POLL_S)
        moved = self._state.running + self._state.waiting
        self.stop()
        return moved

    def submit(self, request: worker_pb2.RunRequest) -> Generation:
        """Queues a generation; its replies come in `replies`.

        Raises:
            InvalidArgument: names what to change.
            Unavailable: the engine is stopping.
            ResourceExhausted: too many wait already, or too many originals.
        """
        generation = self._check.generation(request)
        self._queue.put(generation, lambda: self._free - len(self.batch.preempted))
        return generation

    def cancel(self, generation: Generation) -> None:
        """Frees it within one step. Does nothing if it has ended."""
        self._queue.cancel(generation)

    def drop(self, session_id: str) -> Future[bool]:
        """Frees a session's cache and ends its generation; False if there is none."""
        return self._queue.drop(session_id)

    @property
    def state(self) -> State:
        return self._state

    @property
    def budget(self) -> int | None:
        """Bytes that all caches may hold."""
        return self.sessions.memory.budget

    def set_budget(self, kv_bytes: int | None) -> None:
        """Changes what all caches may hold; the price follows within a few steps."""
        self.sessions.memory.budget = kv_bytes

    @property
    def _free(self) -> int:
        """Places that those who wait or are paused will take."""
        return max(0, self._settings.max_sequences - self.batch.taken)

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while self._queue.wait(busy=bool(self.batch.begun)):
                try:
                    self._step()
                except Exception as error:  # a fault of the engine's own: those it runs end, it goes on
                    self._fail_all(error)
            self._fail_all(Unavailable("the worker stopped; send the request again", retry_after_ms=RETRY_AFTER_MS))
            self.sessions.cache.clear()
            self._drop_asked()
            self._send()

    def _step(self) -> None:
        self._drop_asked()
        self._reap()
        if self.sessions.memory.step(self.batch.sessions, self.sessions.cache):
            self._send()
        self._preemption.step()
        self._admit()
        computing = self._compute_prompts()
        decoding = self.batch.decoding
        if decoding:
            self.batch.decode(decoding)
        self._send()
        if not computing and not decoding:
            self._queue.pause(STORE_POLL_S)  # waits for the store

    def _compute_prompts(self) -> bool:
        """Prompts in order, `prefill_chunk` tokens of them; False if there was nothing to compute."""
        room = most = self._settings.prefill_chunk
        while room > 0 and (prompt := self.batch.next_prefill()):
            room -= self.batch.prefill(prompt, room)
            self._send()
        return room < most

    def _reap(self) -> None:
        """Lets go of generations that nobody listens to."""
        self._queue.forget_cancelled()
        for generation in [g for g in self.batch.begun if g.cancelled]:
            self.batch.release(generation)

    def _admit(self) -> None:
        """Lets generations run, in order, as far as there is room: those that are paused, then those that wait."""
        while self._free and not self._queue.staging_full:
            if self.batch.preempted:
                if not self._preemption.end_first():
                    return
                continue
            candidate = self._queue.first(self.batch.busy)
            if candidate is None or candidate.slots > self._free:
                return
            try:
                if not self.sessions.fits(candidate.request, candidate.slots, self.batch.sessions):
                    return
                self.batch.begin(candidate)
            except Exception as error:
                self._replies.put(candidate, error)
            self._queue.remove(candidate)

    def _fail_all(self, error: Exception) -> None:
        """Ends everything that runs, is paused or waits."""
        for generation in self.batch.begun:
            self.batch.fail(generation, error)
        for generation in self._queue.take_waiting():
            self._replies.put(generation, error)
        self._send()

    def _drop_asked(self) -> None:
        """Does what `drop` asked for. The state says so before the answer does."""
        dropped = []
        for session_id, answer in self._queue.take_drops():
            running = [g for g in self.batch.begun if g.request.session_id == session_id]
            for generation in running:
                self.batch.fail(generation, FailedPrecondition("the session was dropped; open a new one"))
            dropped.append((answer, self.sessions.cache.drop(session_id) or bool(running)))
        if dropped:
            self._send()
        for answer, found in dropped:
            answer.set_result(found)

    def _send(self) -> None:
        """Publishes the state, and hands what there is to say to the event loop, at once."""
        sessions = [*self.batch.sessions, *self.sessions.cache]
        waiting = len(self._queue) + len(self.batch.preempted)
        self._state = observe(len(self.batch.running), waiting, sessions)
        self._replies.send()
