"""What one sequence's cache measured of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStatistics:
    """Measured state of one sequence's cache; bytes are those of allocated buffers.

    Attributes:
        rows_corrected: rows fetched for the decode step that looked at them.
        corrections_late: rows that such a step asked for in vain, because the store did not answer in time.
    """

    tokens: int
    kv_bytes: int
    kv_bytes_fp16: int
    staging_bytes: int
    key_bits: dict[float, int]
    value_bits: dict[float, int]
    exceptions: int
    rows_requantized: int
    requantize_bytes: int
    rows_narrowed: int
    originals_missing: int
    rows_corrected: int = 0
    corrections_late: int = 0

    @property
    def compression(self) -> float:
        """fp16 bytes over resident bytes."""
        return self.kv_bytes_fp16 / self.kv_bytes if self.kv_bytes else 1.0
