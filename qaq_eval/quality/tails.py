"""Tails: the mean hides what a few tokens cost, so the median, the 99% quantile and the maximum stand beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

RESAMPLES = 200
"""Of the bootstrap. Its seed is fixed: the same measurements give the same errors."""

_STATISTICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "median": lambda kl: kl.quantile(0.5, -1),
    "p99": lambda kl: kl.quantile(0.99, -1),
    "max": lambda kl: kl.amax(-1),
}


def standard_error(by_document: Sequence[torch.Tensor]) -> float:
    """Standard error of a mean: over documents, whose tokens are not independent; over tokens of one document."""
    samples = torch.stack([each.mean() for each in by_document]) if len(by_document) > 1 else by_document[0]
    return float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else 0.0


def tails(by_document: Sequence[torch.Tensor]) -> dict[str, float]:
    """kl_mean, kl_median, kl_p99 and kl_max, each with its standard error, such as kl_max_se.

    Errors of the mean are `standard_error`'s. The others are deviations over resampled documents, or over resampled
    tokens of one document. No resample has a larger maximum than the measurement, so the error of the maximum says how
    much it hangs on single documents, not how large it can become.

    Args:
        by_document: float64 [tokens] of each document, in nats.
    """
    every = torch.cat(list(by_document))
    found = {"kl_mean": float(every.mean()), "kl_mean_se": standard_error(by_document)}
    generator = torch.Generator().manual_seed(0)
    of_tokens = len(by_document) == 1
    draws = torch.randint(
        len(every) if of_tokens else len(by_document),
        (RESAMPLES, len(every) if of_tokens else len(by_document)),
        generator=generator,
    )
    resampled = [every[draw] if of_tokens else torch.cat([by_document[i] for i in draw.tolist()]) for draw in draws]
    for name, statistic in _STATISTICS.items():
        values = torch.stack([statistic(sample) for sample in resampled])
        found[f"kl_{name}"], found[f"kl_{name}_se"] = float(statistic(every)), float(values.std())
    return found
