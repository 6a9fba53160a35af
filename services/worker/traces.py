"""What a trace has of a generation: its wait, its prompt and its decoding, each as one span when it is over."""

from __future__ import annotations

import time

from qaq.v1 import common_pb2

from services.common import tracing
from services.worker.generation import Generation, session_of


def record(generation: Generation, error: Exception | None = None) -> None:
    """The spans of a generation that ends. Nothing of its text is in them."""
    trace, now = generation.trace, time.monotonic()
    if trace is None:
        return
    session = session_of(generation)
    first, last = generation.first_token_at or now, generation.last_token_at or now
    tracing.record("queue", trace, generation.arrived, generation.started, choice=generation.choice)
    tracing.record(
        "prefill",
        trace,
        generation.started,
        first,
        **{"gen_ai.usage.input_tokens": generation.prompt_tokens},
        choice=generation.choice,
        tokens_stored=generation.loaded,
        tokens_kept=generation.kept,
    )
    counts, elements = session.sequence.requantizer.counts, session.packed_elements
    tracing.record(
        "decode",
        trace,
        first,
        last,
        **{"gen_ai.usage.output_tokens": generation.generated_tokens},
        choice=generation.choice,
        finish_reason=type(error).__name__ if error else common_pb2.FinishReason.Name(generation.reason),
        kv_tokens=session.sequence.length,
        kv_bytes=session.sequence.nbytes,
        kv_bits=8 * session.sequence.packed.nbytes / elements if elements else 0.0,
        exceptions=counts.exceptions,
        rows_requantized=counts.rows_requantized,
        originals_missing=counts.originals_missing,
        preempted=generation.was_preempted,
    )
