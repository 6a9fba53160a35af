"""The running batch: active generations, their forward passes, and how they end."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import structlog
import torch

from qaq_core.models import LoadedModel
from services.common import metrics
from services.common.errors import ResourceExhausted
from services.worker import traces
from services.worker.call import Reply
from services.worker.constraints import MaskThread
from services.worker.generation import UNFINISHED, Generation, arrival_order, session_of
from services.worker.replies import Replies
from services.worker.scheduler.forward import ForwardPass
from services.worker.session import Session
from services.worker.session_cache import Name, session_name
from services.worker.sessions import Sessions
from services.worker.state import record_finished

PREFILL_LOOKAHEAD = 2
"""Prompts whose stored pages are loaded at a time."""

log = structlog.get_logger()


class RunningBatch:
    """Computes the active generations. Used by the scheduler's thread alone.

    Args:
        decode_threads: threads of a decode step; all but one if not given.
        speculative_tokens: most tokens that are drafted for a sequence which decodes alone.

    Attributes:
        running: generations in prefill, in order of arrival, and in decode.
        preempted: generations that decoded and have no cache now, in order of arrival.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sessions: Sessions,
        replies: Replies,
        decode_threads: int | None,
        speculative_tokens: int = 0,
    ) -> None:
        self._sessions, self._replies = sessions, replies
        self._forward = ForwardPass(loaded)
        self._speculative_tokens = speculative_tokens
        self._threads = torch.get_num_threads()
        # A step is many small operations, and each waits for its slowest thread: leave a core to other processes.
        self._decode_threads = decode_threads or max(1, self._threads - 1)
        self._masks = MaskThread()
        self.running: list[Generation] = []
        self.preempted: list[Generation] = []

    @property
    def active(self) -> list[Generation]:
        """Running and preempted generations."""
        return [*self.running, *self.preempted]

    @property
    def sessions(self) -> list[Session]:
        """Sessions of running generations."""
        return [*map(session_of, self.running)]

    @property
    def slots(self) -> int:
        """Sequences of running generations; a prompt counts as many as it has choices."""
        return sum(generation.slots for generation in self.running)

    @property
    def busy_sessions(self) -> set[Name]:
        """Sessions of active generations."""
        return {session_name(g.request) for g in self.active if g.request.session_id}

    @property
    def decoding(self) -> list[Generation]:
        return [g for g in self.running if g.decodes]

    def start(self, generation: Generation) -> None:
        """Opens the session of a generation and adds it to the running ones.

        Raises:
            ConfigError: the request has an unknown preset, or a target out of range.
        """
        generation.session = session = self._sessions.open(generation.request, generation.tokens, generation.trace)
        generation.started = time.monotonic()
        metrics.queue_seconds.observe(generation.started - generation.arrived)
        history = max(1, generation.request.history_tokens)
        if generation.scores_prompt and (session.loading is not None or session.sequence.length >= history):
            session.reset()
        generation.kept = session.sequence.length
        self._replies.extend(generation, generation.echo())
        self.running.append(generation)

    def preempt(self, generation: Generation) -> None:
        """Stops a decoding generation between two tokens and frees its cache."""
        self._report_pages(generation)
        self._sessions.preempt(session_of(generation))
        generation.was_preempted = True
        self.running.remove(generation)
        self.preempted = sorted([*self.preempted, generation], key=arrival_order)

    def resume(self, generation: Generation) -> None:
        """Runs a preempted generation again. Its log is now a prompt."""
        self.preempted.remove(generation)
        self._sessions.restore(session_of(generation))
        self.running.append(generation)

    # -- a step ----------------------------------------------------------------------------------------

    def next_prefill(self) -> Generation | None:
        """The generation whose prompt is computed next; None if there is none, or if all wait for the store.

        Prompts are computed one at a time, and pages of the first `PREFILL_LOOKAHEAD` are loaded, because full
        precision takes much memory.
        """
        prompts = (g for g in self.running if g.prefilling)
        first = list(itertools.islice(prompts, PREFILL_LOOKAHEAD))
        ready = [generation for generation in first if self._prefix_loaded(generation)]
        return next((g for g in ready if session_of(g).prefill_started), ready[0] if ready else None)

    def _prefix_loaded(self, generation: Generation) -> bool:
        """Whether the load of the stored prefix has ended. Starts or continues the load."""
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
            self._replies.extend(generation, generation.progress(session.loaded))
        return session.loading is None

    def prefill(self, generation: Generation, limit: int) -> int:
        """Computes one chunk of a prompt. After the last chunk, samples the first token of every choice.

        Returns:
            the number of tokens computed, at most `limit`.
        """
        session = session_of(generation)
        torch.set_num_threads(self._threads)
        start, chunk = session.sequence.length, []
        try:
            chunk = session.next_chunk(generation.chunk(limit))
            if generation.slots == 1:  # choices are copies of what is packed
                session.sequence.pack_later()
            logits = self._forward([session], [chunk], len(chunk) if generation.scores_prompt else 1)[0]
            metrics.prompt_tokens.labels("computed").inc(session.sequence.length - start)
            self._replies.extend(generation, generation.progress(session.sequence.length))
            if generation.scores_prompt:
                self._replies.extend(generation, generation.echo_chunk(start, logits))
            if session.uncached:
                return len(chunk)
            others = generation.other_choices()
        except Exception as error:
            self.fail(generation, error)
            return len(chunk)
        self.running += others
        for choice in (generation, *others):
            self._advance(choice, logits[-1:])
        return len(chunk)

    def pack(self, generation: Generation) -> bool:
        """Packs a prompt, once its first token is on its way to the client. Whether there was one to pack."""
        if generation not in self.running:  # that token was its last
            return False
        try:
            return session_of(generation).sequence.pack_prompt()
        except Exception as error:
            self.fail(generation, error)
            return True

    def decode(self, generations: Sequence[Generation]) -> None:
        """Decodes one token of each, or several of one that is alone.

        If the pass fails, retries each alone so that only the faulty one ends.
        """
        if len(generations) == 1 and (draft := self._draft(generations[0])):
            self._verify(generations[0], draft)
            return
        sessions = [session_of(g) for g in generations]
        torch.set_num_threads(self._decode_threads)
        self._masks.prepare([g.mask for g in generations if g.mask is not None])
        try:
            logits = self._forward(sessions, [session.next_chunk(1) for session in sessions], decodes=True)
        except Exception as error:
            if len(generations) == 1:
                self.fail(generations[0], error)
                return
            log.warning("a batch failed; its sequences are decoded one by one", size=len(sessions), error=str(error))
            for generation, session in zip(generations, sessions, strict=True):
                if session.uncached:
                    self.decode([generation])
                else:
                    session.reset()  # its step was done, but its logits are lost
            return
        for generation, row in zip(generations, logits, strict=True):
            self._advance(generation, row)

    def _draft(self, generation: Generation) -> list[int]:
        """What prompt lookup expects next, as far as one pass can verify it."""
        sequence = session_of(generation).sequence
        if not self._speculative_tokens or not sequence.croppable:
            return []
        limit = min(self._speculative_tokens, sequence.draft_room - 1, generation.tokens_left - 1)
        return generation.lookup.draft(session_of(generation).tokens, limit)

    def _verify(self, generation: Generation, draft: Sequence[int]) -> None:
        """Decodes as many tokens as the draft has right, and one more, in one pass."""
        session = session_of(generation)
        torch.set_num_threads(self._decode_threads)
        try:
            chunk = session.next_draft(draft)
            logits = self._forward([session], [chunk], len(chunk), decodes=True)[0]
        except Exception as error:
            self.fail(generation, error)
            return
        metrics.drafted_tokens.inc(len(draft))
        self._advance(generation, logits, draft)

    def _advance(self, generation: Generation, logits: torch.Tensor, draft: Sequence[int] = ()) -> None:
        """Samples the next token, or several if the draft has them right. Finishes the generation if one is the last.

        Args:
            logits: float [1 + drafted, vocabulary], after the log's last token and after each of the draft.
        """
        session = session_of(generation)
        try:
            if generation.reason == UNFINISHED:  # a resumed generation may have ended on the worker before
                sampled = self._sample(generation, logits, draft)
                if draft:
                    session.sequence.accept(sampled)
            self._report_pages(generation)
            if generation.reason != UNFINISHED:
                session.sequence.pack_prompt()
                self._replies.put(generation, generation.done(session.sequence.stats()))
                self.finish(generation)
        except Exception as error:
            self.fail(generation, error)

    def _sample(self, generation: Generation, logits: torch.Tensor, draft: Sequence[int]) -> int:
        """Samples tokens until one is not the drafted one, or is the last. Returns how many.

        The sampler's random numbers depend on the position alone, so these are the tokens of decode.
        """
        session = session_of(generation)
        tokens, errors = session.tokens, session.sequence.predicted_errors
        for sampled, row in enumerate(logits, 1):
            if (shadow := session.shadow) is not None:  # another thread may take it away
                shadow.note(len(tokens), row)
            token = generation.sampler.sample(row, tokens)
            tokens.append(token)
            error = errors[sampled - 1] if errors else None
            if error is not None:
                metrics.predicted_error.observe(error)
            metrics.generated_tokens.inc()
            self._replies.put(generation, generation.accept(token, row, error))
            if generation.reason != UNFINISHED or draft[sampled - 1 : sampled] != [token]:
                break
            metrics.accepted_tokens.inc()
        return sampled

    def _report_pages(self, generation: Generation) -> None:
        """Sends the ids of pages that the store has acknowledged since the last report."""
        if generation.choice:  # only the first of several choices has the session
            return
        session = session_of(generation)
        first, page_ids = session.new_pages()
        if page_ids:
            pages = Reply.Pages(first=first, ids=page_ids, page_tokens=session.method.page_tokens)
            self._replies.put(generation, Reply(pages=pages))

    # -- ends ------------------------------------------------------------------------------------------

    def finish(self, generation: Generation) -> None:
        """Removes a generation that ended or was cancelled. Its session may be kept."""
        session = session_of(generation)
        self._remove(generation)
        record_finished(session)
        traces.record(generation)
        self._sessions.close(generation.request, session)

    def fail(self, generation: Generation, error: Exception) -> None:
        """Ends a generation with an error and discards its cache, which may be damaged."""
        if isinstance(error, torch.OutOfMemoryError):
            error = ResourceExhausted("the device's memory is full; try again later, or with a shorter prompt")
        session = session_of(generation)
        self._replies.put(generation, error)
        self._remove(generation)
        record_finished(session)
        traces.record(generation, error)
        session.close()

    def _remove(self, generation: Generation) -> None:
        (self.preempted if generation in self.preempted else self.running).remove(generation)
