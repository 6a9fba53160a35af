"""What a Prometheus metric shows."""

from __future__ import annotations

from prometheus_client import Counter, Gauge


def value(metric: Counter | Gauge) -> float:
    """Of a metric without labels."""
    (family,) = metric.collect()
    return family.samples[0].value
