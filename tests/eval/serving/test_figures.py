from __future__ import annotations

import pytest

from qaq_eval.serving import figures
from qaq_eval.serving.load import Record


def record(sent: float, *tokens: float, transit: float = 0.0) -> Record:
    return Record(sent, list(tokens), [transit] * len(tokens))


def test_times_and_rates() -> None:
    records = [record(0, 1, 2, 3), record(1, 3, 5), Record(2, error="UNAVAILABLE")]
    assert figures.first_tokens(records).p50 == pytest.approx(1500)
    assert figures.between_tokens(records).p50 == pytest.approx(1000)
    assert figures.between_tokens(records).p99 == pytest.approx(1980)
    assert figures.tokens_per_second(records) == 1.0


def test_fairness_is_the_slowest_against_the_median() -> None:
    streams = [record(0, 1, 2, 3), record(0, 1, 2, 3), record(0, 1, 4, 7)]
    assert figures.slowest_to_median(streams) == 3
    assert figures.slowest_to_median(streams[:1]) is None


def test_nothing_measured() -> None:
    assert figures.first_tokens([]).p50 is None
    assert figures.tokens_per_second([Record(0)]) == 0


def test_the_routers_share_is_between_the_medians() -> None:
    routed, direct = [record(0, 1, 2, transit=0.003)], [record(0, 1, 2, transit=0.001)]
    assert figures.added_ms(routed, direct) == pytest.approx(2)
