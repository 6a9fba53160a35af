"""One generation: what was asked, how far it is, and the messages that tell of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from qaq.v1 import common_pb2, worker_pb2

from qaq_core import CacheStatistics
from services.worker.sampling import Sampler
from services.worker.session import Session
from services.worker.text import TextStream

Reply = worker_pb2.RunReply


class Generation:
    """From a request to its last reply. The engine's thread owns it; others only set `cancelled`.

    Args:
        request: checked.
        eos: tokens that end the text.
        context: most tokens that the log may have.

    Attributes:
        replies: messages for the caller, the last a Done, or an error. At most one a token and one a chunk.
        session: None while it waits.
        cancelled: nobody listens any more.
    """

    def __init__(
        self,
        request: worker_pb2.RunRequest,
        sampler: Sampler,
        text: TextStream,
        eos: Collection[int],
        context: int,
    ) -> None:
        self.request = request
        self.tokens = list(request.token_ids)
        self.sampler = sampler
        self.replies: asyncio.Queue[Reply | Exception] = asyncio.Queue()
        self.session: Session | None = None
        self.cancelled = False
        self._text = text
        self._eos = frozenset() if request.stop.ignore_eos else frozenset(eos)
        self._most = min(request.stop.max_new_tokens, context - len(self.tokens))
        self._generated = 0
        self._arrived = self._first = self._last = time.monotonic()

    def progress(self, done: int) -> Reply:
        """`done` of the prompt's tokens are computed."""
        return Reply(progress=Reply.Progress(tokens_done=done, tokens_total=len(self.tokens)))

    def accept(self, token: int) -> tuple[Reply, common_pb2.FinishReason]:
        """Counts a chosen token.

        Returns:
            its message, and a FinishReason: unspecified while the generation goes on.
        """
        self._last = time.monotonic()
        if self._generated == 0:
            self._first = self._last
        self._generated += 1
        text = self._text.push(token)
        reply = Reply(token=Reply.Token(token_id=token, text=text))
        if token in self._eos:
            return reply, common_pb2.FINISH_REASON_EOS
        if self._text.stopped:
            return reply, common_pb2.FINISH_REASON_STOP
        if self._generated >= self._most:
            return reply, common_pb2.FINISH_REASON_LENGTH
        return reply, common_pb2.FINISH_REASON_UNSPECIFIED

    def done(self, reason: common_pb2.FinishReason, statistics: CacheStatistics) -> Reply:
        """The last message."""
        text = self._text.finish()
        if self._text.stopped:  # in what was held back
            reason = common_pb2.FINISH_REASON_STOP
        usage = common_pb2.Usage(
            prompt_tokens=len(self.tokens),
            generated_tokens=self._generated,
            ttft_ms=(self._first - self._arrived) * 1e3,
            decode_ms=(self._last - self._first) * 1e3,
            cache=cache_stats(statistics),
        )
        return Reply(done=Reply.Done(reason=reason, usage=usage, text=text))


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


def _half_bits(histogram: dict[float, int]) -> dict[int, int]:
    """Widths come in half bits, and a map's keys are whole numbers."""
    return {round(2 * bits): vectors for bits, vectors in histogram.items()}
