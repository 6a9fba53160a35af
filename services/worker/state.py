"""The load of a worker and what its caches hold, for routers and for the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.common import metrics
from services.worker.session import Session

_COUNTERS = {
    "exceptions": metrics.exceptions,
    "originals_missing": metrics.originals_missing,
    "rows_corrected": metrics.rows_corrected,
    "corrections_late": metrics.corrections_late,
}
"""By the name of a count of `RequantizeCounts`."""


@dataclass(frozen=True)
class WorkerState:
    """What a worker runs and holds.

    Attributes:
        running: generations in prefill or decode.
        waiting: generations that wait or are preempted.
        sessions: sessions that hold a cache, idle ones included.
        kv_bytes: allocated bytes of all caches.
        bits: mean bits per packed element, scales and tags included; 0 if nothing is packed.
        fp16_bytes: of the same keys and values at 16 bits per element.
        exceptions, rows_requantized: counts of all these caches, see `RequantizeCounts`.
    """

    running: int = 0
    waiting: int = 0
    sessions: int = 0
    kv_bytes: int = 0
    bits: float = 0.0
    fp16_bytes: int = 0
    exceptions: int = 0
    rows_requantized: int = 0


def summarize(running: int, waiting: int, sessions: Sequence[Session], host_bytes: int = 0) -> WorkerState:
    """The state now. Sets the gauges to it.

    Args:
        host_bytes: of originals that stay in host memory.
    """
    packed = sum(session.sequence.packed.nbytes for session in sessions)
    elements = sum(session.packed_elements for session in sessions)
    bits = 8 * packed / elements if elements else 0.0
    fp16_bytes = sum(session.fp16_bytes for session in sessions)
    counts = [session.sequence.requantizer.counts for session in sessions]
    state = WorkerState(
        running=running,
        waiting=waiting,
        sessions=len(sessions),
        kv_bytes=sum(session.sequence.nbytes for session in sessions),
        bits=bits,
        fp16_bytes=fp16_bytes,
        exceptions=sum(each.exceptions for each in counts),
        rows_requantized=sum(each.rows_requantized for each in counts),
    )
    metrics.kv_bytes.labels("device").set(state.kv_bytes)
    metrics.kv_bytes.labels("host").set(host_bytes)
    metrics.kv_bytes.labels("staging").set(sum(session.sequence.staging_bytes for session in sessions))
    metrics.kv_mean_bits.set(bits)
    metrics.kv_compression_ratio.set(fp16_bytes / state.kv_bytes if state.kv_bytes else 1.0)
    metrics.sessions.set(state.sessions)
    metrics.running.set(running)
    metrics.queue_depth.set(waiting)
    return state


def record_finished(session: Session) -> None:
    """A generation ended. Adds its cache's events to the counters and sets the gauge of the bits it held."""
    sequence = session.sequence
    stats = sequence.stats()
    metrics.kv_bits.clear()
    for side, histogram in (("key", stats.key_bits), ("value", stats.value_bits)):
        for bits, vectors in histogram.items():
            metrics.kv_bits.labels(side, str(bits)).set(vectors)
    counts = session.sequence.requantizer.counts
    for name, counter in _COUNTERS.items():
        counter.inc(getattr(counts, name) - session.counted.get(name, 0))
        session.counted[name] = getattr(counts, name)
