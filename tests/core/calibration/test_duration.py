"""How long a calibration takes is said before it, and again by its own pace."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qaq_core.calibration import duration
from qaq_core.calibration.duration import SAMPLING, SAMPLING_SHARE, Pace, estimate


def test_the_rest_is_told_by_the_pace_so_far(caplog: pytest.LogCaptureFixture) -> None:
    seconds = iter([0.0, 30.0, 60.0, 90.0, 600.0, 606.0, 660.0])
    passed: list[tuple[str, float]] = []
    pace = Pace("Tiny", logging.WARNING, lambda *part: passed.append(part), lambda: next(seconds))
    parts = [(SAMPLING, 0.1), (SAMPLING, 0.5), (SAMPLING, 0.6), ("calibrating", 0.5), ("calibrating", 0.6)]
    for part in (*parts, ("calibrating", 1.0)):
        pace(*part)
    assert passed == [*parts, ("calibrating", 1.0)]
    done = [0.5 * SAMPLING_SHARE, 0.5 + 0.5 * SAMPLING_SHARE]
    left = [at / share * (1 - share) / 60 for at, share in zip((60, 600), done, strict=True)]
    assert [record.getMessage() for record in caplog.records] == [
        f"calibrating Tiny: {100 * share:.0f}% done, about {minutes:.0f} minutes left"
        for share, minutes in zip(done, left, strict=True)
    ]


def test_one_slow_pass_is_not_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0

    def model(**_: Any) -> None:
        nonlocal passes
        passes += 1

    model.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(max_position_embeddings=64))  # type: ignore[attr-defined]
    model.parameters = lambda: iter([torch.zeros(1)])  # type: ignore[attr-defined]

    def estimated(taken: list[float]) -> float:
        def clock() -> Iterator[float]:
            for seconds in taken:
                yield 0.0
                yield seconds

        nonlocal passes
        passes = 0
        monkeypatch.setattr(duration, "perf_counter", clock().__next__)
        return estimate(model, 1000)

    assert estimated([0.01] * 7) == pytest.approx(12.0)
    assert estimated([0.5, *[0.01] * 6]) == pytest.approx(12.0)
    assert passes == 8
    assert estimated([5.0]) == pytest.approx(6000.0)
    assert passes == 2
