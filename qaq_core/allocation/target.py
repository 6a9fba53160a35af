"""Targets: what a sequence should hold after its prompt."""

from __future__ import annotations

from dataclasses import dataclass

from qaq_core.base.checks import number

LEAST_BITS = 0.5
"""Code bits an element that a compression never goes below."""


@dataclass(frozen=True)
class Target:
    """What a sequence should hold after its prompt. One of them; compression wins over bits, error over both.

    Attributes:
        bits: mean code bits per element.
        compression: resident, against fp16.
        error: predicted KL from full precision, in nats per decoded token.
    """

    bits: float | None = None
    compression: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if self.bits is not None:
            number("target_bits", self.bits, 0, 16, above=True)
        if self.compression is not None:
            number("target_compression", self.compression, 1, 32)
        if self.error is not None:
            number("target_error", self.error, 0, 10, above=True, unit=" nats")

    @property
    def given(self) -> bool:
        return any(value is not None for value in (self.bits, self.compression, self.error))

    def bits_for(self, tokens: int, packed: int, fixed_bytes: int, elements_per_token: int) -> float | None:
        """Mean code bits per element that meet the target; None if it names neither bits nor a compression.

        Args:
            tokens: of the sequence; `packed` of them hold codes, everything else takes `fixed_bytes`.
            elements_per_token: numbers in one token's keys and values, over all layers.
        """
        if self.compression is None:
            return self.bits
        allowed = tokens * elements_per_token * 2 / self.compression - fixed_bytes
        return max(LEAST_BITS, allowed * 8 / (packed * elements_per_token))
