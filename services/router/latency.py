"""How long tokens lately took through this router."""

from __future__ import annotations

import statistics
from collections import deque

from services.common import metrics

REMEMBERED = 512


class RelayLatency:
    """The last tokens' times between their arrival from a worker and their leaving for a client."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)

    def took(self, seconds: float) -> None:
        self._seconds.append(seconds)
        metrics.relay_seconds.observe(seconds)

    @property
    def median_ms(self) -> float | None:
        """None before the first token."""
        return statistics.median(self._seconds) * 1e3 if self._seconds else None
