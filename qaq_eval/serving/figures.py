"""Figures out of records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from qaq_eval.serving.load import Record


class Percentiles(BaseModel):
    """In milliseconds; None where nothing was measured."""

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
    """From sending a request to its first token."""
    return Percentiles.of([record.tokens[0] - record.sent for record in records if record.tokens])


def between_tokens(records: Sequence[Record]) -> Percentiles:
    """Between two tokens of a stream, over all streams."""
    return Percentiles.of([gap for record in records for gap in _gaps(record)])


def tokens_per_second(records: Sequence[Record]) -> float:
    """All tokens, over the time from the first request to the last token."""
    tokens = [at for record in records for at in record.tokens]
    return len(tokens) / (max(tokens) - min(record.sent for record in records)) if tokens else 0.0


def slowest_to_median(records: Sequence[Record]) -> float | None:
    """How much longer the slowest stream takes a token than the median one; None with under two streams."""
    means = [statistics.fmean(gaps) for record in records if (gaps := _gaps(record))]
    return max(means) / statistics.median(means) if len(means) > 1 else None


def added_ms(routed: Sequence[Record], direct: Sequence[Record]) -> float:
    """What a router adds to a token's way from the worker to the client, between the medians of both ways."""
    ways = [statistics.median(s for record in records for s in record.carried) for records in (routed, direct)]
    return (ways[0] - ways[1]) * 1e3


def _gaps(record: Record) -> list[float]:
    return [after - before for before, after in zip(record.tokens, record.tokens[1:], strict=False)]
