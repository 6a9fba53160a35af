"""The engine: one thread that computes, for all generations of a worker.

A step is at most one chunk of one prompt and then one token of every sequence that decodes, in one
forward pass. Everything but `submit`, `cancel`, `drop` and `state` belongs to the thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import structlog
import torch
from qaq.v1 import common_pb2, worker_pb2

from qaq_core import Originals, QAQCache
from qaq_core.loading import LoadedModel
from services.common import metrics
from services.common.errors import FailedPrecondition, ResourceExhausted, Unavailable
from services.common.settings import WorkerSettings
from services.worker.generation import Generation, Reply
from services.worker.request import Checker
from services.worker.session import Session
from services.worker.sessions import Sessions
from services.worker.state import State, count, observe

RETRY_AFTER_MS = 1000
STORE_POLL_S = 0.005
_GOING_ON = common_pb2.FINISH_REASON_UNSPECIFIED

log = structlog.get_logger()


class Engine:
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
        self._loaded, self._settings, self._loop = loaded, settings, loop
        self._originals = originals
        self._sessions = Sessions(loaded, originals, settings)
        self._check = Checker(loaded, settings)
        self._device = next(loaded.model.parameters()).device
        self._threads = torch.get_num_threads()
        self._wake = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._drops: list[tuple[str, Future[bool]]] = []
        self._stopping = self._draining = False
        self._running: list[Generation] = []
        self._outbox: list[tuple[Generation, Reply | Exception]] = []
        self._state = State()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- for any thread --------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends every generation with UNAVAILABLE and waits for the thread, at most for one step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def drain(self, patience_s: float) -> int:
        """Takes nothing new, waits for the store to have what was computed, and stops. Others go on from there.

        Returns:
            how many generations ended with UNAVAILABLE for that.
        """
        with self._wake:
            self._draining = True
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
            ResourceExhausted: too many wait already.
        """
        generation = self._check.generation(request)
        with self._wake:
            if self._stopping or self._draining:
                raise Unavailable("this worker is stopping; send the request again", retry_after_ms=RETRY_AFTER_MS)
            if self._staging_full:
                raise ResourceExhausted(
                    f"{self._originals.pending_bytes:,} bytes of originals wait for a cache service, more than "
                    "QAQ_STAGING_BUDGET_BYTES; try again later, and look whether cache services and Redis run",
                    retry_after_ms=RETRY_AFTER_MS,
                )
            if len(self._waiting) >= self._settings.max_waiting + self._free:
                raise ResourceExhausted(
                    f"{len(self._waiting)} generations wait already; try again later",
                    retry_after_ms=RETRY_AFTER_MS,
                )
            self._waiting.append(generation)
            self._wake.notify()
        return generation

    def cancel(self, generation: Generation) -> None:
        """Frees it within one step. Does nothing if it has ended."""
        with self._wake:
            generation.listener.cancelled = True
            self._wake.notify()

    def drop(self, session_id: str) -> Future[bool]:
        """Frees a session's cache and ends its generation; False if there is none."""
        answer: Future[bool] = Future()
        with self._wake:
            if self._stopping:
                answer.set_result(False)
                return answer
            self._drops.append((session_id, answer))
            self._wake.notify()
        return answer

    @property
    def state(self) -> State:
        return self._state

    @property
    def budget(self) -> int | None:
        """Bytes that all caches may hold."""
        return self._sessions.pressure.budget

    def set_budget(self, kv_bytes: int | None) -> None:
        """Changes what all caches may hold; the price follows within a few steps."""
        self._sessions.pressure.budget = kv_bytes

    @property
    def _staging_full(self) -> bool:
        return self._originals.pending_bytes > self._settings.staging_budget_bytes

    @property
    def _free(self) -> int:
        """Places that those who wait now will take."""
        return max(0, self._settings.max_sequences - self._taken)

    @property
    def _taken(self) -> int:
        """Sequences that run, and those that will once their prompt is computed."""
        return sum(generation.slots for generation in self._running)

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while self._next():
                try:
                    self._step()
                except Exception as error:  # a fault of the engine's own: those it runs end, it goes on
                    self._fail_all(error)
            self._fail_all(
                Unavailable("the worker stopped; send the request again", retry_after_ms=RETRY_AFTER_MS)
            )
            self._sessions.shelf.clear()
            self._drop_asked()
            self._send()

    def _next(self) -> bool:
        """Waits for work; False when the engine stops."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._drops or self._waiting or self._running)
            return not self._stopping

    def _step(self) -> None:
        self._drop_asked()
        self._reap()
        self._sessions.pressure.step([*map(_session, self._running)], self._sessions.shelf)
        self._admit()
        # One prompt at a time: full precision takes a lot of room.
        prompt = next((g for g in self._running if _session(g).prefilling), None)
        computing = prompt is not None and self._loaded_prefix(prompt)
        if prompt is not None and computing:
            self._prefill(prompt)
            self._send()
        decoding = [g for g in self._running if not _session(g).prefilling]
        if decoding:
            self._decode(decoding)
        self._send()
        if not computing and not decoding:  # waits for the store
            with self._wake:
                self._wake.wait(STORE_POLL_S)

    def _loaded_prefix(self, generation: Generation) -> bool:
        """Whether what is stored of its prompt is here; asks for it if need be."""
        session = _session(generation)
        if session.loading is None:
            return True
        try:
            session.poll()
        except Exception as error:
            self._fail(generation, error)
            return False
        if session.loading is None and session.loaded:
            metrics.prompt_tokens.labels("stored").inc(session.loaded)
            self._outbox.append((generation, generation.progress(session.loaded)))
        return session.loading is None

    def _reap(self) -> None:
        """Lets go of generations that nobody listens to."""
        with self._wake:
            self._waiting = deque(g for g in self._waiting if not g.cancelled)
        for generation in [g for g in self._running if g.cancelled]:
            self._release(generation)

    def _admit(self) -> None:
        """Moves generations from the queue to those that run, in order, as far as there is room."""
        while self._free and not self._staging_full:
            busy = {g.request.session_id for g in self._running} - {""}
            with self._wake:
                candidate = next((g for g in self._waiting if g.request.session_id not in busy), None)
            if candidate is None or candidate.slots > self._free:
                return
            try:
                if not self._sessions.fits(candidate.request, candidate.slots, [*map(_session, self._running)]):
                    return
                self._begin(candidate)
            except Exception as error:
                self._outbox.append((candidate, error))
            with self._wake:
                self._waiting.remove(candidate)

    def _begin(self, generation: Generation) -> None:
        generation.session = session = self._sessions.open(generation.request, generation.tokens)
        held = max(1, generation.request.held)
        if generation.scores_prompt and (session.loading is not None or session.sequence.length >= held):
            session.rebuild()
        self._outbox += [(generation, reply) for reply in generation.echo()]
        self._running.append(generation)

    def _prefill(self, generation: Generation) -> None:
        session = _session(generation)
        torch.set_num_threads(self._threads)
        start = session.sequence.length
        try:
            chunk = session.next_chunk(generation.chunk(self._settings.prefill_chunk))
            logits = self._forward([session], [chunk], len(chunk) if generation.scores_prompt else 1)[0]
            metrics.prompt_tokens.labels("computed").inc(session.sequence.length - start)
            self._outbox.append((generation, generation.progress(session.sequence.length)))
            if generation.scores_prompt:
                self._outbox += [(generation, reply) for reply in generation.echo_chunk(start, logits)]
            if session.lacking:
                return
            others = list(generation.branches())
        except Exception as error:
            self._fail(generation, error)
            return
        self._running += others
        for choice in (generation, *others):
            self._advance(choice, logits[-1])

    def _decode(self, generations: Sequence[Generation]) -> None:
        """One token for each. If the pass fails, each is tried alone, so that only the faulty one ends."""
        sessions = [_session(g) for g in generations]
        # A step is many small operations, and each waits for its slowest thread: leave a core to the others.
        torch.set_num_threads(max(1, self._threads - 1))
        try:
            logits = self._forward(sessions, [session.next_chunk(1) for session in sessions])
        except Exception as error:
            if len(generations) == 1:
                self._fail(generations[0], error)
                return
            log.warning("a batch failed; its sequences go on one by one", size=len(sessions), error=str(error))
            for generation, session in zip(generations, sessions, strict=True):
                if session.lacking:
                    self._decode([generation])
                else:
                    session.rebuild()  # its step was done, but the logits are lost
            return
        for generation, row in zip(generations, logits, strict=True):
            self._advance(generation, row[-1])

    def _forward(self, sessions: Sequence[Session], chunks: Sequence[list[int]], keep: int = 1) -> torch.Tensor:
        """Computes the next tokens of each session, equally many.

        Returns:
            logits [sessions, keep, vocabulary] of the last tokens.
        """
        starts = [session.sequence.length for session in sessions]
        positions = [list(range(at, at + len(chunk))) for at, chunk in zip(starts, chunks, strict=True)]
        output = self._loaded.model(
            input_ids=torch.tensor(chunks, device=self._device),
            position_ids=torch.tensor(positions, device=self._device),
            past_key_values=QAQCache([session.sequence for session in sessions]),
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits
        return logits

    def _advance(self, generation: Generation, logits: torch.Tensor) -> None:
        """Chooses the next token and ends the generation if it was the last."""
        session = _session(generation)
        self._tell_pages(generation)
        try:
            if generation.reason == _GOING_ON:  # else it had ended before it came here
                token = generation.sampler.choose(logits, session.tokens)
                session.tokens.append(token)
                self._outbox.append((generation, generation.accept(token, logits)))
            if generation.reason != _GOING_ON:
                done = generation.done(session.sequence.stats())
                done.done.usage.loaded_tokens = session.loaded
                self._outbox.append((generation, done))
                self._release(generation)
        except Exception as error:
            self._fail(generation, error)

    def _tell_pages(self, generation: Generation) -> None:
        """Tells which pages the store has acknowledged."""
        if generation.choice:  # of several choices one has the session
            return
        first, names = _session(generation).fresh_pages()
        if names:
            self._outbox.append((generation, Reply(pages=Reply.Pages(first=first, ids=names))))

    # -- ends ------------------------------------------------------------------------------------------

    def _release(self, generation: Generation) -> None:
        """Takes a generation out; its session may stay."""
        session = _session(generation)
        self._running.remove(generation)
        count(session)
        self._sessions.leave(generation.request, session)

    def _fail(self, generation: Generation, error: Exception) -> None:
        """Ends one generation with an error; its cache cannot be trusted any more."""
        if isinstance(error, torch.OutOfMemoryError):
            error = ResourceExhausted("the device's memory is full; try again later, or with a shorter prompt")
        session = _session(generation)
        self._outbox.append((generation, error))
        self._running.remove(generation)
        count(session)
        session.close()

    def _fail_all(self, error: Exception) -> None:
        """Ends everything that runs or waits."""
        for generation in list(self._running):
            self._fail(generation, error)
        with self._wake:
            self._outbox += [(generation, error) for generation in self._waiting]
            self._waiting.clear()
        self._send()

    def _drop_asked(self) -> None:
        """Does what `drop` asked for."""
        with self._wake:
            drops, self._drops = self._drops, []
        for session_id, answer in drops:
            running = [g for g in self._running if g.request.session_id == session_id]
            for generation in running:
                self._fail(generation, FailedPrecondition("the session was dropped; open a new one"))
            answer.set_result(self._sessions.shelf.drop(session_id) or bool(running))

    def _send(self) -> None:
        """Hands what there is to say to the event loop, at once."""
        sessions = [*map(_session, self._running), *self._sessions.shelf]
        self._state = observe(len(self._running), len(self._waiting), sessions)
        if self._outbox:
            batch, self._outbox = self._outbox, []
            self._loop.call_soon_threadsafe(_deliver, batch)


def _session(generation: Generation) -> Session:
    """The session of a generation that runs."""
    assert generation.session is not None
    return generation.session


def _deliver(batch: Sequence[tuple[Generation, Reply | Exception]]) -> None:
    for generation, reply in batch:
        generation.replies.put_nowait(reply)
