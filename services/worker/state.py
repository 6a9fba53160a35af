"""How busy a worker is and what its caches hold, for routers and for the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.common import metrics
from services.worker.session import Session


@dataclass(frozen=True)
class State:
    """Generations that run and wait; sessions that hold a cache, idle ones too; its bytes and its bits an element.

    Attributes:
        bits: of packed elements, scales and tags included.
    """

    running: int = 0
    waiting: int = 0
    sessions: int = 0
    kv_bytes: int = 0
    bits: float = 0.0


def observe(running: int, waiting: int, sessions: Sequence[Session]) -> State:
    """The state now; the gauges are set to it."""
    packed = sum(session.sequence.packed.nbytes for session in sessions)
    elements = sum(session.packed_elements for session in sessions)
    bits = 8 * packed / elements if elements else 0.0
    state = State(running, waiting, len(sessions), sum(s.sequence.nbytes for s in sessions), bits)
    halves = sum(session.half_precision_bytes for session in sessions)
    metrics.kv_bytes.labels("device").set(state.kv_bytes)
    metrics.kv_bytes.labels("staging").set(sum(session.sequence.staging_bytes for session in sessions))
    metrics.kv_compression_ratio.set(halves / state.kv_bytes if state.kv_bytes else 1.0)
    metrics.sessions.set(state.sessions)
    metrics.queue_depth.set(waiting)
    return state


def count(session: Session) -> None:
    """A generation ended: adds to the counters what its cache met, and shows the bits that it held."""
    sequence = session.sequence
    stats = sequence.stats()
    metrics.kv_bits.clear()
    for side, histogram in (("key", stats.key_bits), ("value", stats.value_bits)):
        for bits, vectors in histogram.items():
            metrics.kv_bits.labels(side, str(bits)).set(vectors)
    met = session.sequence.requantizer.counts
    for name, counter in (("exceptions", metrics.exceptions), ("originals_missing", metrics.originals_missing)):
        counter.inc(getattr(met, name) - session.counted[name])
        session.counted[name] = getattr(met, name)
