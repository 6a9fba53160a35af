"""Angles of single positions, without a table of all positions before them."""

from __future__ import annotations

import pytest
import torch

from qaq_core.base import rope
from qaq_core.base.rope import Angles

CPU = torch.device("cpu")
FREQUENCIES = 10_000.0 ** -(torch.arange(2 * 16, dtype=torch.float64).view(2, 16) / 32)
KIND = torch.tensor([0, 1, 1, 0, 1])


def test_they_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    position = torch.tensor([0, 1, 4095, 4096, 70_000])
    table = Angles(FREQUENCIES, CPU)(70_001)
    assert torch.equal(Angles(FREQUENCIES, CPU).at(KIND, position), table[KIND, position])
    monkeypatch.setattr(rope, "TABLE_BYTES", 0)
    single = Angles(FREQUENCIES, CPU)
    assert single.far(70_001)
    assert torch.equal(single.at(KIND, position), table[KIND, position])


def test_a_table_that_grows_stays_the_same() -> None:
    grown = Angles(FREQUENCIES, CPU)
    first = grown(10)
    assert torch.equal(grown(9000)[:, : first.shape[1]], first)
    assert torch.equal(grown(9000), Angles(FREQUENCIES, CPU)(9000))


def test_positions_far_away_need_no_table() -> None:
    angles = Angles(FREQUENCIES.repeat(2, 4), CPU)  # 4 kinds of 128 dims: a table of all positions has 2 GiB
    assert angles.at(KIND, torch.full((5,), (1 << 20) - 1)).shape == (5, 128)
    assert angles._table.nbytes <= rope.TABLE_BYTES
