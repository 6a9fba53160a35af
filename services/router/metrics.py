"""Times of tokens in a router."""

from __future__ import annotations

import statistics
import time
from collections import deque

from qaq.v1 import common_pb2

from services.common import metrics

RECENT = 512


class RelayLatency:
    """How long the most recent tokens were in the router: from their arrival until gRPC has taken them for a client."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=RECENT)

    def observe(self, seconds: float) -> None:
        self._seconds.append(seconds)
        metrics.relay_seconds.observe(seconds)

    @property
    def median_ms(self) -> float | None:
        """None before the first token."""
        return statistics.median(self._seconds) * 1e3 if self._seconds else None


class TokenTimes:
    """Observes the time to the first token of each choice, and the time between two tokens."""

    def __init__(self, choices: int) -> None:
        self._last = [time.monotonic()] * max(1, choices)

    def observe(self, token: common_pb2.Token) -> None:
        """Records a token that arrives now."""
        now = time.monotonic()
        metric = metrics.inter_token_seconds if token.index else metrics.time_to_first_token_seconds
        metric.observe(now - self._last[token.choice])
        self._last[token.choice] = now
