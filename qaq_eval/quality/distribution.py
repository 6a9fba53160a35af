"""The distribution of keys and values and of their outliers (the paper's figure 2c)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core import make_method
from qaq_eval.quality.documents import Document
from qaq_eval.quality.prompt import full_precision

QUANTILES = (0.0, 0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999, 1.0)
DEVIATIONS = (3, 4, 6, 10)
WORST_CHANNELS = 1 / 16
"""Share of channels among which the outliers are counted: outliers cluster in few channels."""


@dataclass(frozen=True)
class LayerDistribution:
    """The keys, or the values, of one layer. `deviation` is the standard deviation.

    Attributes:
        side: "key" (after RoPE, as cached) or "value".
        quantiles: {"0.01": number, …}, from the minimum to the maximum.
        beyond: {"3": share of numbers more than 3 deviations from the mean, …}; 0.0027, 6e-5, 2e-9, … for a normal
            distribution.
        in_few_channels: share of the numbers beyond 3 deviations that are in the worst 1/16 of (head, channel) pairs.
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
) -> list[LayerDistribution]:
    """The distributions of every layer, over the documents' prompts in full precision."""
    method = make_method(model, fingerprint, "fp16")
    prompts = []
    for i, document in enumerate(documents):
        if progress:
            progress(f"document {i + 1} of {len(documents)}", i / len(documents))
        prompts.append(full_precision(model, method, document, []).originals)
    layers = []
    for layer in range(method.shape.layers):
        for side, name in enumerate(("key", "value")):
            layers.append(_distribution(layer, name, torch.cat([prompt[layer, side] for prompt in prompts], 1)))
    return layers


def _distribution(layer: int, side: str, vectors: torch.Tensor) -> LayerDistribution:
    """The distribution of vectors [kv_heads, tokens, head_dim]."""
    numbers = vectors.double()
    mean, deviation = float(numbers.mean()), float(numbers.std(correction=0))
    sorted_numbers = numbers.flatten().sort().values
    places = [round(q * (len(sorted_numbers) - 1)) for q in QUANTILES]
    distance = (numbers - mean).abs() / max(deviation, 1e-30)
    by_channel = (distance > DEVIATIONS[0]).sum(1).flatten().sort(descending=True).values
    worst = max(1, round(len(by_channel) * WORST_CHANNELS))
    return LayerDistribution(
        layer=layer,
        side=side,
        mean=mean,
        deviation=deviation,
        quantiles={str(q): float(sorted_numbers[place]) for q, place in zip(QUANTILES, places, strict=True)},
        beyond={str(limit): float((distance > limit).double().mean()) for limit in DEVIATIONS},
        in_few_channels=float(by_channel[:worst].sum() / by_channel.sum().clamp_min(1)),
    )
