"""The batch: the generations that run, what a forward pass makes of them, and how they end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import structlog
import torch
from qaq.v1 import common_pb2

from qaq_core import QAQCache
from qaq_core.models import LoadedModel
from services.common import metrics
from services.common.errors import ResourceExhausted
from services.worker.generation import Generation, Reply, age, session_of
from services.worker.replies import Replies
from services.worker.session import Session
from services.worker.sessions import Sessions
from services.worker.state import count

AHEAD = 2
"""Prompts whose stored pages are fetched at a time."""

_GOING_ON = common_pb2.FINISH_REASON_UNSPECIFIED

log = structlog.get_logger()


class RunningBatch:
    """Computes the generations that run. Belongs to the engine's thread.

    Args:
        decode_threads: for a decode step; all but one if not given.

    Attributes:
        running: those that compute their prompt, in the order in which they came, and those that decode.
        preempted: those that decoded and have no cache now, in the order in which they came.
    """

    def __init__(self, loaded: LoadedModel, sessions: Sessions, replies: Replies, decode_threads: int | None) -> None:
        self._loaded, self._sessions, self._replies = loaded, sessions, replies
        self._device = next(loaded.model.parameters()).device
        self._threads = torch.get_num_threads()
        # A step is many small operations, and each waits for its slowest thread: leave a core to the others.
        self._decode_threads = decode_threads or max(1, self._threads - 1)
        self.running: list[Generation] = []
        self.preempted: list[Generation] = []

    @property
    def begun(self) -> list[Generation]:
        """Those that run and those that are paused."""
        return [*self.running, *self.preempted]

    @property
    def sessions(self) -> list[Session]:
        """Of those that run."""
        return [*map(session_of, self.running)]

    @property
    def taken(self) -> int:
        """Sequences that run, and those that will once their prompt is computed."""
        return sum(generation.slots for generation in self.running)

    @property
    def busy(self) -> set[str]:
        """Ids of sessions that run or are paused."""
        return {g.request.session_id for g in self.begun} - {""}

    @property
    def decoding(self) -> list[Generation]:
        return [g for g in self.running if not session_of(g).prefilling]

    def begin(self, generation: Generation) -> None:
        """Opens the session of a generation, which runs from now on.

        Raises:
            ConfigError: the request names an unknown preset, or a target out of range.
        """
        generation.session = session = self._sessions.open(generation.request, generation.tokens)
        held = max(1, generation.request.history_tokens)
        if generation.scores_prompt and (session.loading is not None or session.sequence.length >= held):
            session.rebuild()
        self._replies.put_all(generation, generation.echo())
        self.running.append(generation)

    def pause(self, generation: Generation) -> None:
        """Takes out one that decodes, between two tokens, and frees its cache."""
        self._tell_pages(generation)
        self._sessions.pause(session_of(generation))
        generation.was_preempted = True
        self.running.remove(generation)
        self.preempted = sorted([*self.preempted, generation], key=age)

    def resume(self, generation: Generation) -> None:
        """Lets one run again that was paused; its log is a prompt now."""
        self.preempted.remove(generation)
        self._sessions.restore(session_of(generation))
        self.running.append(generation)

    # -- a step ----------------------------------------------------------------------------------------

    def next_prefill(self) -> Generation | None:
        """The one whose prompt is computed next; None if there is none, or if all wait for the store.

        One at a time, and the first `AHEAD` load what is stored: full precision takes a lot of room.
        """
        first = list(itertools.islice((g for g in self.running if session_of(g).prefilling), AHEAD))
        ready = [generation for generation in first if self._loaded_prefix(generation)]
        return next((g for g in ready if session_of(g).begun), ready[0] if ready else None)

    def _loaded_prefix(self, generation: Generation) -> bool:
        """Whether what is stored of its prompt is here; asks for it if need be."""
        session = session_of(generation)
        if session.loading is None:
            return True
        try:
            session.poll()
        except Exception as error:
            self.fail(generation, error)
            return False
        if session.loading is None and session.loaded:
            metrics.prompt_tokens.labels("stored").inc(session.loaded)
            if not generation.was_preempted:
                generation.loaded = session.loaded
            self._replies.put_all(generation, generation.progress(session.loaded))
        return session.loading is None

    def prefill(self, generation: Generation, most: int) -> int:
        """One chunk of its prompt; after the last one its first token, and that of its other choices.

        Returns:
            how many tokens it took, at most `most`.
        """
        session = session_of(generation)
        torch.set_num_threads(self._threads)
        start, chunk = session.sequence.length, []
        try:
            chunk = session.next_chunk(generation.chunk(most))
            logits = self._forward([session], [chunk], len(chunk) if generation.scores_prompt else 1)[0]
            metrics.prompt_tokens.labels("computed").inc(session.sequence.length - start)
            self._replies.put_all(generation, generation.progress(session.sequence.length))
            if generation.scores_prompt:
                self._replies.put_all(generation, generation.echo_chunk(start, logits))
            if session.lacking:
                return len(chunk)
            others = list(generation.branches())
        except Exception as error:
            self.fail(generation, error)
            return len(chunk)
        self.running += others
        for choice in (generation, *others):
            self._advance(choice, logits[-1])
        return len(chunk)

    def decode(self, generations: Sequence[Generation]) -> None:
        """One token for each. If the pass fails, each is tried alone, so that only the faulty one ends."""
        sessions = [session_of(g) for g in generations]
        torch.set_num_threads(self._decode_threads)
        try:
            logits = self._forward(sessions, [session.next_chunk(1) for session in sessions])
        except Exception as error:
            if len(generations) == 1:
                self.fail(generations[0], error)
                return
            log.warning("a batch failed; its sequences go on one by one", size=len(sessions), error=str(error))
            for generation, session in zip(generations, sessions, strict=True):
                if session.lacking:
                    self.decode([generation])
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
        session = session_of(generation)
        self._tell_pages(generation)
        try:
            if generation.reason == _GOING_ON:  # else it had ended before it came here
                token = generation.sampler.choose(logits, session.tokens)
                session.tokens.append(token)
                self._replies.put(generation, generation.accept(token, logits))
            if generation.reason != _GOING_ON:
                self._replies.put(generation, generation.done(session.sequence.stats()))
                self.release(generation)
        except Exception as error:
            self.fail(generation, error)

    def _tell_pages(self, generation: Generation) -> None:
        """Tells which pages the store has acknowledged."""
        if generation.choice:  # of several choices one has the session
            return
        first, names = session_of(generation).fresh_pages()
        if names:
            self._replies.put(generation, Reply(pages=Reply.Pages(first=first, ids=names)))

    # -- ends ------------------------------------------------------------------------------------------

    def release(self, generation: Generation) -> None:
        """Takes a generation out; its session may stay."""
        session = session_of(generation)
        self._take_out(generation)
        count(session)
        self._sessions.leave(generation.request, session)

    def fail(self, generation: Generation, error: Exception) -> None:
        """Ends one generation with an error; its cache cannot be trusted any more."""
        if isinstance(error, torch.OutOfMemoryError):
            error = ResourceExhausted("the device's memory is full; try again later, or with a shorter prompt")
        session = session_of(generation)
        self._replies.put(generation, error)
        self._take_out(generation)
        count(session)
        session.close()

    def _take_out(self, generation: Generation) -> None:
        (self.preempted if generation in self.preempted else self.running).remove(generation)
