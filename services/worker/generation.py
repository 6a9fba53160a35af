"""One choice of a request: its parameters, its progress, and its messages to the caller."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from qaq.v1 import common_pb2, worker_pb2

from qaq_core import CacheStatistics
from services.common import tracing
from services.worker.cache_stats import cache_stats
from services.worker.call import Call, Reply
from services.worker.constraints import GrammarMask
from services.worker.logprobs import Logprobs
from services.worker.lookup import PromptLookup
from services.worker.sampling import Sampler
from services.worker.session import Session
from services.worker.text import TextStream

UNFINISHED = common_pb2.FINISH_REASON_UNSPECIFIED

REPLAYED = 4096
"""Messages with tokens that are kept for a call which takes the generation over."""

# Prompt tokens computed at a time when the log-probability of each is requested: their logits take much memory.
_SCORED_CHUNK = 128


@dataclass(frozen=True)
class ChoiceDecoder:
    """How one choice samples tokens and turns them into text.

    Attributes:
        mask: of the request's constraint; the sampler applies it.
    """

    sampler: Sampler
    text: TextStream
    mask: GrammarMask | None = None


class Generation:
    """One choice of a request, from its arrival to its last reply. Used by the scheduler's thread alone.

    Args:
        request: validated. If it has `generated_tokens`, it continues a generation of another worker.
        decoders: one for each choice.
        eos: end-of-sequence tokens.
        context: the model's context length in tokens.

    Attributes:
        session: None before it started.
        slots: sequences that it takes in a decode step; before the prompt is computed, one for each choice.
        reason: why it finished; `UNFINISHED` while it runs.
        arrived, started: seconds of the monotonic clock, of its call and of its admission to the batch.
        first_token_at, last_token_at: the same; 0 before there is one.
        prompt_tokens, generated_tokens: how many.
        trace: that its call belongs to.
        loaded: tokens of the prompt that came from the store.
        kept: tokens of the prompt that its session's cache had.
        was_preempted: its prompt has been computed and reported once.
        branched: its prompt is computed, and its other choices have begun.
        lookup: drafts its next tokens.
    """

    def __init__(
        self,
        request: worker_pb2.RunRequest,
        decoders: Sequence[ChoiceDecoder],
        logprobs: Logprobs,
        eos: Collection[int],
        context: int,
        choice: int = 0,
        call: Call | None = None,
    ) -> None:
        self.request, self.choice = request, choice
        self.tokens = list(request.token_ids)
        self.session: Session | None = None
        self.slots = len(decoders)
        self.reason: common_pb2.FinishReason = UNFINISHED
        self.loaded = self.kept = 0
        self.was_preempted = self.branched = False
        self.lookup = PromptLookup()
        self.call = call or Call()
        self._decoders, self._eos, self._context = decoders, eos, context
        self.sampler, self._text, self.mask = decoders[0].sampler, decoders[0].text, decoders[0].mask
        self._logprobs = logprobs
        self._stop_tokens = frozenset(request.stop.stop_token_ids)
        self.prompt_tokens = len(self.tokens) - request.generated_tokens
        self._max_new_tokens = context - self.prompt_tokens
        if request.stop.HasField("max_new_tokens"):
            self._max_new_tokens = min(self._max_new_tokens, request.stop.max_new_tokens)
        self._generated = 0
        self._sent: deque[Reply] = deque(maxlen=REPLAYED)
        self._final_token: int | None = None
        if request.stop.HasField("max_new_tokens") and request.stop.max_new_tokens == 0:
            self.reason = common_pb2.FINISH_REASON_LENGTH
        self.arrived = self.started = time.monotonic()
        self.first_token_at = self.last_token_at = 0.0
        self.trace = tracing.current()
        for token in self.tokens[self.prompt_tokens :]:
            self._count(token)

    @property
    def replies(self) -> asyncio.Queue[Reply | Exception]:
        return self.call.replies

    @property
    def cancelled(self) -> bool:
        return self.call.cancelled

    @property
    def generated_tokens(self) -> int:
        return self._generated

    @property
    def decodes(self) -> bool:
        """The next forward pass is a decode step, and somebody waits for its token."""
        return not (self.prefilling or self.call.left)

    @property
    def tokens_left(self) -> int:
        """The most tokens that may still be generated."""
        return self._max_new_tokens - self._generated

    @property
    def prefilling(self) -> bool:
        """The next forward pass is a chunk of its prompt. A prompt of one token is a prompt, too."""
        return not self.branched or session_of(self).prefilling

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of prompt tokens are requested; then the whole prompt is computed here."""
        return self._logprobs.scores_prompt and not self.was_preempted

    def chunk(self, limit: int) -> int:
        """The number of prompt tokens to compute at a time, at most `limit`."""
        return min(limit, _SCORED_CHUNK) if self.scores_prompt else limit

    def progress(self, done: int) -> Iterator[Reply]:
        """The message that `done` of the prompt's tokens are computed."""
        if not self.was_preempted:
            yield Reply(prefill=common_pb2.PrefillProgress(tokens_done=done, tokens_total=len(self.tokens)))

    def echo(self) -> Iterator[Reply]:
        """The prompt's tokens, if they are requested without log-probabilities."""
        if self._logprobs.echoed and not self._logprobs.scores_prompt:
            new = self.tokens[self.request.history_tokens :]
            yield _prompt_message([self._logprobs.token_info(token) for token in new])

    def echo_chunk(self, start: int, logits: torch.Tensor) -> Iterator[Reply]:
        """The prompt tokens whose log-probabilities a chunk has given.

        Args:
            start: position of the chunk's first token.
            logits: float [tokens computed, vocabulary].
        """
        history = self.request.history_tokens
        if start == 0 and history == 0:
            yield _prompt_message([self._logprobs.token_info(self.tokens[0])])
        first = max(start + 1, history)
        last = min(start + len(logits) + 1, len(self.tokens))
        if first < last:
            rows = logits[first - 1 - start : last - 1 - start]
            yield _prompt_message(list(self._logprobs.prompt(self.tokens[first:last], rows)))

    def other_choices(self) -> list[Generation]:
        """The other choices, each with a copy of this one's cache. Call it once, when the prompt is computed.

        If a copy fails, those made before are closed.
        """
        assert self.session is not None
        decoders, self._decoders, self.slots = self._decoders[1:], self._decoders[:1], 1
        self.branched = True
        others: list[Generation] = []
        try:
            for choice, decoder in enumerate(decoders, start=1):
                other = Generation(self.request, [decoder], self._logprobs, self._eos, self._context, choice, self.call)
                other.arrived, other.started, other.trace = self.arrived, self.started, self.trace
                other.loaded, other.kept = self.loaded, self.kept
                other.branched = True
                other.session = self.session.fork()
                others.append(other)
        except BaseException:
            for other in others:
                session_of(other).close()
            raise
        return others

    def accept(self, token: int, logits: torch.Tensor, error: float | None = None) -> Reply:
        """Counts a sampled token and makes its message. Sets `reason` if it was the last.

        Args:
            logits: float [vocabulary] that the token was sampled from.
            error: the predicted error of this distribution, in nats.
        """
        self.last_token_at = time.monotonic()
        self.first_token_at = self.first_token_at or self.last_token_at
        index, text = self._generated, self._count(token)
        info = self._logprobs.generated(token, logits, error) if self._logprobs.requested else None
        message = common_pb2.Token(
            token_id=token, text=text, index=index, choice=self.choice, info=info, chosen_at=time.time()
        )
        self._sent.append(reply := Reply(token=message))
        return reply

    def serves(self, other: Generation) -> bool:
        """Whether it generates what another request asks for: the same turn, from a token on that is still known."""
        known = self.session.tokens if self.session else self.tokens
        request, begins = other.request, self._generated - len(self._sent)
        if request.choices > 1 or _turn(self.request) != _turn(request) or known[: len(other.tokens)] != other.tokens:
            return False
        echoed = request.output.echo and not request.generated_tokens  # the echo is not kept
        return not echoed and begins <= request.generated_tokens <= self._generated

    def hand_over(self, other: Generation) -> list[Reply]:
        """Goes on for the call of another generation, which it serves. Returns the tokens that call has missed."""
        self.call, self.trace, self.request.fence = other.call, other.trace, other.request.fence
        missed = self._generated - other.request.generated_tokens
        if self.session is not None:
            self.session.reported = 0
        return list(self._sent)[len(self._sent) - missed :]

    def _count(self, token: int) -> str:
        """Adds a token, returns the text that became final, and sets `reason` if the token was the last."""
        self._generated += 1
        if self.mask is not None:
            self.mask.accept(token)
        if token in self._stop_tokens:
            self.reason, self._final_token = common_pb2.FINISH_REASON_STOP, token
            return ""
        if token in self._eos and not self.request.stop.ignore_eos:
            self.reason, self._final_token = common_pb2.FINISH_REASON_EOS, token
            return ""
        text = self._text.push(token, may_stop=self._generated >= self.request.stop.min_new_tokens)
        if self._text.stop_found is not None:
            self.reason = common_pb2.FINISH_REASON_STOP
        elif self._generated >= self._max_new_tokens:
            self.reason = common_pb2.FINISH_REASON_LENGTH
        return text

    def done(self, statistics: CacheStatistics) -> Reply:
        """The last message."""
        text = self._text.finish()
        if self._text.stop_found is not None:  # in what was held back
            self.reason = common_pb2.FINISH_REASON_STOP
        usage = common_pb2.Usage(
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self._generated,
            ttft_ms=max(0.0, self.first_token_at - self.arrived) * 1e3,
            decode_ms=(self.last_token_at - self.first_token_at) * 1e3,
            cache=cache_stats(statistics),
            loaded_tokens=self.loaded,
            kept_tokens=self.kept,
        )
        finished = common_pb2.Finished(reason=self.reason, usage=usage, text=text, choice=self.choice)
        if self._text.stop_found is not None:
            finished.stop_string = self._text.stop_found
        elif self._final_token is not None:
            finished.stop_token_id = self._final_token
        return Reply(finished=finished)


def session_of(generation: Generation) -> Session:
    """The session of an active generation."""
    assert generation.session is not None
    return generation.session


def arrival_order(generation: Generation) -> tuple[float, int]:
    """A sort key: the time of arrival, then the index of the choice."""
    return generation.arrived, generation.choice


def _turn(request: worker_pb2.RunRequest) -> worker_pb2.RunRequest:
    """A request without what differs between two calls for the same turn."""
    turn = worker_pb2.RunRequest()
    turn.CopyFrom(request)
    for name in ("token_ids", "generated_tokens", "page_ids", "fence", "lambda_floor"):
        turn.ClearField(name)
    return turn


def _prompt_message(tokens: Sequence[common_pb2.TokenInfo]) -> Reply:
    return Reply(prompt=common_pb2.PromptTokens(tokens=tokens))
