"""What a cache holds, as a message."""

from __future__ import annotations

from qaq.v1 import common_pb2

from qaq_core import CacheStatistics


def cache_stats(statistics: CacheStatistics) -> common_pb2.CacheStats:
    """The statistics as a message."""
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
    """Vectors by width in half bits: widths are multiples of 0.5, and map keys in protobuf are integers."""
    return {round(2 * bits): vectors for bits, vectors in histogram.items()}
