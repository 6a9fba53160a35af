"""How the numbers of keys and values are distributed, and where their outliers are (the paper's figure 2c)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core import make_method
from qaq_eval.quality.documents import Document
from qaq_eval.quality.prompt import compute

QUANTILES = (0.0, 0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999, 1.0)
BEYOND = (3, 4, 6, 10)
CHANNELS = 1 / 16
"""Share of a head's channels that outliers are looked for in: they prefer few."""


@dataclass(frozen=True)
class Spread:
    """The keys, or the values, of one layer. A deviation is the root of the mean square around the mean.

    Attributes:
        side: "key" (after RoPE, as cached) or "value".
        quantiles: {"0.01": number, …} from the smallest to the largest number.
        beyond: {"3": share of numbers more than 3 deviations from the mean, …}; of a normal 0.0027, 6e-5, 2e-9.
        in_few_channels: share of those beyond 3 deviations that the worst 1/16 of (head, channel) hold.
    """

    layer: int
    side: str
    mean: float
    deviation: float
    quantiles: dict[str, float]
    beyond: dict[str, float]
    in_few_channels: float


@torch.no_grad()
def distribution(
    model: Any,
    fingerprint: str | None,
    documents: Sequence[Document],
    progress: Callable[[str, float], None] | None = None,
) -> list[Spread]:
    """Of every layer, keys and values of the documents' prompts in full precision."""
    method = make_method(model, fingerprint, "fp16")
    prompts = []
    for i, document in enumerate(documents):
        if progress:
            progress(f"document {i + 1} of {len(documents)}", i / len(documents))
        prompts.append(compute(model, method, document, []).originals)
    spreads = []
    for layer in range(method.shape.layers):
        for side, name in enumerate(("key", "value")):
            spreads.append(_spread(layer, name, torch.cat([prompt[layer, side] for prompt in prompts], 1)))
    return spreads


def _spread(layer: int, side: str, vectors: torch.Tensor) -> Spread:
    """Of vectors [kv_heads, tokens, head_dim]."""
    numbers = vectors.double()
    mean, deviation = float(numbers.mean()), float(numbers.std(correction=0))
    ordered = numbers.flatten().sort().values
    places = [round(q * (len(ordered) - 1)) for q in QUANTILES]
    away = (numbers - mean).abs() / max(deviation, 1e-30)
    by_channel = (away > BEYOND[0]).sum(1).flatten().sort(descending=True).values
    few = max(1, round(len(by_channel) * CHANNELS))
    return Spread(
        layer=layer,
        side=side,
        mean=mean,
        deviation=deviation,
        quantiles={str(q): float(ordered[place]) for q, place in zip(QUANTILES, places, strict=True)},
        beyond={str(limit): float((away > limit).double().mean()) for limit in BEYOND},
        in_few_channels=float(by_channel[:few].sum() / by_channel.sum().clamp_min(1)),
    )
