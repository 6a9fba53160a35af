"""Statistics of records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from qaq_eval.serving.load import Record


class Percentiles(BaseModel):
    """Percentiles in milliseconds; None without measurements."""

    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        if not seconds:
            return cls(p50=None, p95=None, p99=None)
        p50, p95, p99 = (float(value) * 1e3 for value in np.percentile(seconds, (50, 95, 99)))
        return cls(p50=p50, p95=p95, p99=p99)


def first_tokens(records: Sequence[Record]) -> Percentiles:
    """Time to first token (TTFT), from sending the request."""
    return Percentiles.of([record.tokens[0] - record.sent for record in records if record.tokens])


def between_tokens(records: Sequence[Record]) -> Percentiles:
    """Inter-token latency, over all streams."""
    return Percentiles.of([gap for record in records for gap in _gaps(record)])


def tokens_per_second(records: Sequence[Record]) -> float:
    """All tokens over the time from the first request to the last token."""
    tokens = [at for record in records for at in record.tokens]
    return len(tokens) / (max(tokens) - min(record.sent for record in records)) if tokens else 0.0


def slowest_to_median(records: Sequence[Record]) -> float | None:
    """Mean time per token of the slowest stream over that of the median stream; None with fewer than two streams."""
    means = [statistics.fmean(gaps) for record in records if (gaps := _gaps(record))]
    return max(means) / statistics.median(means) if len(means) > 1 else None


def mean_gap_ms(records: Sequence[Record]) -> float:
    """Mean milliseconds between two tokens of a stream, over all streams."""
    return statistics.fmean(gap for record in records for gap in _gaps(record)) * 1e3


def added_ms(routed: Sequence[Record], direct: Sequence[Record]) -> float:
    """Milliseconds that a router adds to the median time from a token's sampling to its arrival at the client."""
    medians = [statistics.median(s for record in records for s in record.transit) for records in (routed, direct)]
    return (medians[0] - medians[1]) * 1e3


def _gaps(record: Record) -> list[float]:
    return [after - before for before, after in zip(record.tokens, record.tokens[1:], strict=False)]
