"""How long a calibration takes: estimated before it, and again every minute by its own pace."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

Progress = Callable[[str, float], None]

SAMPLING = "sampling text to calibrate on"
"""The stage before all others."""
SAMPLING_SHARE = 0.6
"""Of the time that a calibration takes."""
SAY_EVERY_S = 60.0

_PASSES = 1.2
"""Time of a calibration, in passes over 32 tokens for each of its tokens."""
_TIMED_S = 1.0
"""Passes are timed until they took this long together, or are as many as `_MOST_TIMED`."""
_MOST_TIMED = 7

log = logging.getLogger(__name__)


def estimate(model: Any, tokens: int) -> float:
    """Seconds that measuring a model on sequences of that many tokens takes, by the median of some short passes."""
    n = min(32, model.config.get_text_config(decoder=True).max_position_embeddings)
    ids = torch.zeros(1, n, dtype=torch.long, device=next(model.parameters()).device)
    taken: list[float] = []
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        while sum(taken) < _TIMED_S and len(taken) < _MOST_TIMED:
            begun = perf_counter()
            model(input_ids=ids, use_cache=False)
            taken.append(perf_counter() - begun)
    return statistics.median(taken) * tokens * _PASSES


def told(seconds: float) -> str:
    """A duration in words."""
    return f"{seconds / 60:.0f} minutes" if seconds > 90 else "a minute" if seconds > 30 else "half a minute at most"


class Pace:
    """Hands a calibration's progress on, and says every minute how long the rest takes at the pace so far.

    Args:
        name: of what is calibrated. level: that it is logged at.
        report: called with every stage and its share, if given.
        clock: seconds.
    """

    def __init__(
        self, name: str, level: int, report: Progress | None = None, clock: Callable[[], float] = perf_counter
    ) -> None:
        self._name, self._level, self._report, self._clock = name, level, report, clock
        self._begun = self._said = clock()

    def __call__(self, stage: str, share: float) -> None:
        if self._report is not None:
            self._report(stage, share)
        now = self._clock()
        done = share * SAMPLING_SHARE if stage == SAMPLING else SAMPLING_SHARE + share * (1 - SAMPLING_SHARE)
        if now - self._said < SAY_EVERY_S or not 0 < done < 1:
            return
        self._said = now
        left = (now - self._begun) / done * (1 - done)
        log.log(self._level, "calibrating %s: %.0f%% done, about %s left", self._name, 100 * done, told(left))
