"""One continuation of a prompt: what was asked, how far it is, and the messages that tell of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from qaq.v1 import common_pb2, worker_pb2

from qaq_core import CacheStatistics
from services.worker.logprobs import Likelihood
from services.worker.sampling import Sampler
from services.worker.session import Session
from services.worker.text import TextStream

Reply = worker_pb2.RunReply

_GOING_ON = common_pb2.FINISH_REASON_UNSPECIFIED
# Tokens of a prompt that are computed at once when each one's likelihood is wanted: their logits are large.
_SCORED_CHUNK = 128


@dataclass
class Listener:
    """The call that a request came with; all its choices share it.

    Attributes:
        replies: messages for the caller: for each choice a Finished at last, or else an error. At most one a token
            and two a chunk.
        cancelled: nobody listens any more.
    """

    replies: asyncio.Queue[Reply | Exception] = field(default_factory=asyncio.Queue)
    cancelled: bool = False


@dataclass(frozen=True)
class Voice:
    """What each choice has of its own."""

    sampler: Sampler
    text: TextStream


class Generation:
    """From a request to the last reply of one choice. The engine's thread owns it.

    Args:
        request: checked. With `generated` tokens it goes on where another worker stopped.
        voices: one for each choice.
        eos: tokens that end the text.
        context: most tokens that the log may have.

    Attributes:
        session: None before it ran.
        slots: sequences that it takes, or will take once the prompt is computed.
        reason: unspecified while it goes on.
        arrived: when, in seconds of the monotonic clock.
        loaded: tokens of its prompt that came from the store.
        was_preempted: its prompt has been told of.
    """

    def __init__(
        self,
        request: worker_pb2.RunRequest,
        voices: Sequence[Voice],
        likelihood: Likelihood,
        eos: Collection[int],
        context: int,
        choice: int = 0,
        listener: Listener | None = None,
    ) -> None:
        self.request, self.choice = request, choice
        self.tokens = list(request.token_ids)
        self.session: Session | None = None
        self.slots = len(voices)
        self.reason: common_pb2.FinishReason = _GOING_ON
        self.loaded, self.was_preempted = 0, False
        self.listener = listener or Listener()
        self._voices, self._eos, self._context = voices, eos, context
        self.sampler, self._text = voices[0].sampler, voices[0].text
        self._likelihood = likelihood
        self._ends = frozenset(request.stop.stop_token_ids)
        self._prompt = len(self.tokens) - request.generated_tokens
        self._most = context - self._prompt
        if request.stop.HasField("max_new_tokens"):
            self._most = min(self._most, request.stop.max_new_tokens)
        self._generated = 0
        self._ended_by: int | None = None
        self.arrived = self._first = self._last = time.monotonic()
        for token in self.tokens[self._prompt :]:
            self._count(token)

    @property
    def replies(self) -> asyncio.Queue[Reply | Exception]:
        return self.listener.replies

    @property
    def cancelled(self) -> bool:
        return self.listener.cancelled

    @property
    def left(self) -> int:
        """Tokens that may come."""
        return self._most - self._generated

    @property
    def scores_prompt(self) -> bool:
        """The prompt's tokens are wanted with their likelihoods, so all of it has to be computed here."""
        return self.request.output.echo and self._likelihood.wanted and not self.was_preempted

    def chunk(self, most: int) -> int:
        """How many tokens of the prompt to compute at once."""
        return min(most, _SCORED_CHUNK) if self.scores_prompt else most

    def progress(self, done: int) -> Iterator[Reply]:
        """`done` of the prompt's tokens are computed."""
        if not self.was_preempted:
            yield Reply(prefill=common_pb2.PrefillProgress(tokens_done=done, tokens_total=len(self.tokens)))

    def echo(self) -> Iterator[Reply]:
        """The prompt, if it is wanted without likelihoods."""
        if self.request.output.echo and not self._likelihood.wanted:
            yield _echoed([self._likelihood.plain(token) for token in self.tokens[self.request.history_tokens :]])

    def echo_chunk(self, start: int, logits: torch.Tensor) -> Iterator[Reply]:
        """The prompt's tokens whose likelihoods have just been computed.

        Args:
            start: position of the first token that was computed.
            logits: float [tokens computed, vocabulary].
        """
        held = self.request.history_tokens
        if start == 0 and held == 0:
            yield _echoed([self._likelihood.plain(self.tokens[0])])
        first = max(start + 1, held)
        last = min(start + len(logits) + 1, len(self.tokens))
        if first < last:
            rows = logits[first - 1 - start : last - 1 - start]
            yield _echoed(list(self._likelihood.of(self.tokens[first:last], rows)))

    def branches(self) -> Iterator[Generation]:
        """The other choices, which go on from a copy of this one's cache. Call it when the prompt is computed."""
        assert self.session is not None
        others, self._voices, self.slots = self._voices[1:], self._voices[:1], 1
        for choice, voice in enumerate(others, start=1):
            other = Generation(self.request, [voice], self._likelihood, self._eos, self._context, choice, self.listener)
            other.arrived, other.loaded = self.arrived, self.loaded
            other.session = self.session.fork()
            yield other

    def accept(self, token: int, logits: torch.Tensor) -> Reply:
        """Counts a chosen token and makes its message; `reason` tells whether it was the last.

        Args:
            logits: float [vocabulary], which it was chosen from.
        """
        self._last = time.monotonic()
        if self._generated == 0:
            self._first = self._last
        index, text = self._generated, self._count(token)
        info = next(self._likelihood.of([token], logits[None])) if self._likelihood.wanted else None
        message = common_pb2.Token(
            token_id=token, text=text, index=index, choice=self.choice, info=info, chosen_at=time.time()
        )
        return Reply(token=message)

    def _count(self, token: int) -> str:
        """Adds a token; returns the text that became certain and sets `reason`."""
        self._generated += 1
        if token in self._ends:
            self.reason, self._ended_by = common_pb2.FINISH_REASON_STOP, token
            return ""
        text = self._text.push(token)
        if token in self._eos and not self.request.stop.ignore_eos:
            self.reason, self._ended_by = common_pb2.FINISH_REASON_EOS, token
        elif self._text.found is not None:
            self.reason = common_pb2.FINISH_REASON_STOP
        elif self._generated >= self._most:
            self.reason = common_pb2.FINISH_REASON_LENGTH
        return text

    def done(self, statistics: CacheStatistics) -> Reply:
        """The last message."""
        text = self._text.finish()
        if self._text.found is not None:  # in what was held back
            self.reason = common_pb2.FINISH_REASON_STOP
        usage = common_pb2.Usage(
            prompt_tokens=self._prompt,
            generated_tokens=self._generated,
            ttft_ms=(self._first - self.arrived) * 1e3,
            decode_ms=(self._last - self._first) * 1e3,
            cache=cache_stats(statistics),
            loaded_tokens=self.loaded,
        )
        finished = common_pb2.Finished(reason=self.reason, usage=usage, text=text, choice=self.choice)
        if self._text.found is not None:
            finished.stop_string = self._text.found
        elif self._ended_by is not None:
            finished.stop_token_id = self._ended_by
        return Reply(finished=finished)


def session_of(generation: Generation) -> Session:
    """The session of a generation that runs."""
    assert generation.session is not None
    return generation.session


def age(generation: Generation) -> tuple[float, int]:
    """Sorts generations by when they came; choices of one by their number."""
    return generation.arrived, generation.choice


def cache_stats(statistics: CacheStatistics) -> common_pb2.CacheStats:
    """The same figures as a message."""
    return common_pb2.CacheStats(
        tokens=statistics.tokens,
        kv_bytes=statistics.kv_bytes,
        kv_bytes_fp16=statistics.kv_bytes_fp16,
        staging_bytes=statistics.staging_bytes,
        key_bits_histogram=_half_bits(statistics.key_bits),
        value_bits_histogram=_half_bits(statistics.value_bits),
        exceptions=statistics.exceptions,
        rows_requantized=statistics.rows_requantized,
        requantize_bytes=statistics.requantize_bytes,
        rows_narrowed=statistics.rows_narrowed,
        originals_missing=statistics.originals_missing,
    )


def _echoed(tokens: Sequence[common_pb2.TokenInfo]) -> Reply:
    return Reply(prompt=common_pb2.PromptTokens(tokens=tokens))


def _half_bits(histogram: dict[float, int]) -> dict[int, int]:
    """Widths come in half bits, and a map's keys are whole numbers."""
    return {round(2 * bits): vectors for bits, vectors in histogram.items()}
