"""Bytes of sessions at full precision, at 8 bits and in QAQ's cache, from the numbers of a model alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qaq_core.base.errors import ConfigError
from services.cli.model_size import ModelSize

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FREE_SHARE = 0.9
"""Of a GPU's memory, for weights and caches; activations and the driver take the rest."""
EXACT_TOKENS = 16
"""Tokens that are never packed: sinks and the residual window."""
COMPRESSED_BYTE = {"bfloat16": 2.9, "float32": 2.9, "float16": 5.9}
"""Bits that the byte with the exponent takes in a compressed page, measured on SmolLM2: `qaq bench store`."""
_MEASURED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Measured:
    """A recorded result of the `balanced` preset.

    Attributes:
        model, context: what was measured.
        kl: mean KL divergence in nats a token. compression: of tokens that are packed.
        requantize_share: bytes that re-quantization fetches for a token, over those of a token at fp16.
    """

    model: str
    context: int
    kl: float
    compression: float
    requantize_share: float


@dataclass(frozen=True)
class Saving:
    """One kind of cache.

    Attributes:
        session_bytes: on the GPU. all_bytes: of all sessions.
        fits: sessions that fit beside the weights; None without a GPU.
        network_bytes: a token between worker, cache service and Redis; 0 if nothing leaves the worker.
        kl, measured_on: what the cache costs, and the model and context that it was measured on.
    """

    cache: str
    session_bytes: int
    all_bytes: int
    fits: int | None = None
    network_bytes: int = 0
    kl: float | None = None
    measured_on: str = ""


def measured() -> list[Measured]:
    return [Measured(**row) for row in json.loads(_MEASURED.read_text("utf-8"))]


def results_for(context: int, kl: float | None, results: Sequence[Measured]) -> list[Measured]:
    """What was measured at the longest context up to this one, or the shortest of all; of each model.

    Args:
        kl: keeps the best compression of each model whose KL is at most this.
    Raises:
        ConfigError: nothing is so exact.
    """
    contexts = sorted({result.context for result in results})
    nearest = max((length for length in contexts if length <= context), default=contexts[0])
    found = [result for result in results if result.context == nearest]
    if kl is not None:
        best = sorted((result for result in found if result.kl <= kl), key=lambda result: result.compression)
        found = list({result.model: result for result in best}.values())
        if not found:
            least = min(result.kl for result in results if result.context == nearest)
            raise ConfigError(f"no result at {nearest} tokens has a KL of at most {kl:g}; the least is {least:.4f}")
    return sorted(found, key=lambda result: (result.model, result.compression))


def savings(
    model: ModelSize,
    context: int,
    sessions: int,
    dtype: str = "bfloat16",
    kl: float | None = None,
    room: float | None = None,
    results: Sequence[Measured] | None = None,
) -> list[Saving]:
    """fp16, fp8 and each of QAQ's results.

    Args:
        room: bytes for caches on the GPU; None if it is not known.
    """
    held = model.held_elements(context)

    def saving(cache: str, size: float, **facts: object) -> Saving:
        fits = None if room is None else int(max(room, 0) // size)
        return Saving(cache, round(size), round(size) * sessions, fits, **facts)  # type: ignore[arg-type]

    rows = [saving("fp16", 2 * held), saving("fp8", held)]
    exact = min(context, EXACT_TOKENS)
    for result in results_for(context, kl, measured() if results is None else results):
        size = 2 * model.elements * (exact + (context - exact) / result.compression)
        network = token_bytes(model, dtype) + stored_token_bytes(model, dtype, "plain")
        rows.append(
            saving(
                f"QAQ {result.compression:.1f}x",
                size,
                network_bytes=round(network + 2 * model.elements * result.requantize_share),
                kl=result.kl,
                measured_on=f"{result.model}, {result.context:,} tokens",
            )
        )
    return rows


def token_bytes(model: ModelSize, dtype: str) -> int:
    """Bytes of a token's originals, as a worker sends them."""
    return model.elements * ITEM_BYTES[dtype]


def stored_token_bytes(model: ModelSize, dtype: str, form: str) -> float:
    """Bytes of a token's originals in Redis, with their share of checksums and index.

    Args:
        form: "plain", "lossless" or "int8", as the setting `page_form`.
    """
    rows, dim = model.layers * 2 * model.kv_heads, model.head_dim
    if form == "plain":
        return rows * (dim * ITEM_BYTES[dtype] + 8)
    group = 10 / 16  # checksum and size, shared by 16 rows
    if form == "int8":
        return rows * (dim + 4 + group)
    return rows * (dim * (ITEM_BYTES[dtype] - 1 + COMPRESSED_BYTE[dtype] / 8) + group)


def cache_room(gpu_bytes: float, weight_bytes: float) -> float:
    """Bytes that a GPU has for caches.

    Raises:
        ConfigError: the weights do not fit.
    """
    room = FREE_SHARE * gpu_bytes - weight_bytes
    if room <= 0:
        raise ConfigError(
            f"weights of {weight_bytes / 1e9:.1f} GB do not fit into {FREE_SHARE:.0%} of {gpu_bytes / 1e9:.1f} GB; "
            "give more --gpu-memory, or the size of quantized weights as --weights"
        )
    return room
