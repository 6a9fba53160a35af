"""What `qaq demo` measures. Light to import: nothing here needs torch."""

from __future__ import annotations

from pydantic import BaseModel


class Piece(BaseModel):
    """A token of the text, and how many of its vectors got more bits in decode."""

    text: str
    rows: int


class FullPrecision(BaseModel):
    """What a full-precision cache answers, and how far the quantized one is from it on the served answer's tokens.

    Attributes:
        text, tokens: greedy, with the same repetition penalty.
        compared_tokens: tokens of the served answer, on which both caches are compared.
        same_tokens: tokens at the beginning that both answers share.
        first_difference: index of the first token that differs; None if all are the same.
        kl_mean, kl_p99, kl_max: KL divergence from full precision, in nats per compared token.
        top1_agreement: share of the compared tokens at which both find the same token most likely.
        kv_bytes: of the full-precision cache at the end, in the model's dtype.
        repeated_tokens: tokens at the beginning of the served answer that the quantized cache here chooses, too.
        requantized_tokens, requantized_rows: tokens, and their vectors, that got more bits in decode, each vector
            counted as often as it did.
        passage: the passage with the most of them.
    """

    text: str
    tokens: int
    compared_tokens: int
    same_tokens: int
    first_difference: int | None
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    kv_bytes: int
    repeated_tokens: int
    requantized_tokens: int
    requantized_rows: int
    passage: list[Piece]


class DemoResult(BaseModel):
    """What `--json` writes; its schema is services/schemas/demo.json.

    Attributes:
        full_precision: None if it was not compared.
    """

    text: str
    tokens: int
    tokens_per_second: float
    ttft_ms: float
    kv_bytes: int
    kv_bytes_fp16: int
    compression: float
    bits_histogram: dict[str, dict[str, int]]
    exceptions: int
    rows_requantized: int
    requantize_bytes: int
    staging_bytes: int
    originals_bytes_in_redis: int
    redis_server: str
    prompt_tokens: int
    full_precision: FullPrecision | None
