"""Tails: median, 99% quantile and maximum, and how sure they are."""

from __future__ import annotations

import pytest
import torch

from qaq_eval.quality.tails import standard_error, tails


def test_tails_by_hand() -> None:
    kl = torch.tensor([0.0] * 60 + [0.1] * 39 + [2.0, 3.0], dtype=torch.float64)  # 101 tokens: p99 is the 100th
    found = tails([kl])
    assert found["kl_mean"] == pytest.approx((3.9 + 5) / 101)
    assert (found["kl_median"], found["kl_p99"], found["kl_max"]) == (0.0, 2.0, 3.0)
    assert found["kl_mean_se"] == pytest.approx(float(kl.std()) / 101**0.5)
    assert found["kl_max_se"] > 0  # a third of the resamples miss the largest
    assert found == tails([kl])


def test_errors_are_over_documents() -> None:
    one, other = torch.tensor([0.1, 0.1, 0.1]).double(), torch.tensor([0.4, 0.4, 0.4]).double()
    found = tails([one, other])
    assert found["kl_mean_se"] == pytest.approx(0.15)
    # Two documents give (.1, .1), (.1, .4), (.4, .1) and (.4, .4): a maximum of .4 in three of four resamples.
    assert found["kl_max_se"] == pytest.approx(0.3 * (0.75 * 0.25) ** 0.5, rel=0.15)
    same = tails([one, one.clone()])
    assert [same[f"kl_{name}_se"] for name in ("mean", "median", "p99", "max")] == [0, 0, 0, 0]


def test_one_token_has_no_error() -> None:
    assert standard_error([torch.tensor([0.3]).double()]) == 0.0
    assert tails([torch.tensor([0.3]).double()])["kl_p99"] == pytest.approx(0.3)
