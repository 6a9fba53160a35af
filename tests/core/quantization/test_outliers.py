"""Outliers: the extremes of every group, exact to half precision, with their indices counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.base.errors import QuantizationError
from qaq_core.quantization.outliers import split_outliers
from tests.core.rows import GRANULARITIES, HEAD_DIMS, normal

LAYERS, HEADS, TOKENS = 2, 3, 5


def groups(rows: torch.Tensor, group: str) -> torch.Tensor:
    """Rows as [groups, numbers], one group of one token each."""
    order = {"head": (0, 1, 2, 3), "layer": (0, 2, 1, 3), "token": (2, 0, 1, 3)}[group]
    size = {"head": 1, "layer": HEADS, "token": LAYERS * HEADS}[group] * rows.shape[3]
    return rows.permute(*order).reshape(-1, size)


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), ratio=st.sampled_from((0.01, 0.05, 0.2)))
@pytest.mark.parametrize("group", GRANULARITIES)
def test_the_lowest_and_highest_of_every_group_are_kept(group: str, seed: int, dim: int, ratio: float) -> None:
    rows = normal(seed, LAYERS, HEADS, TOKENS, dim)
    _, mask = split_outliers(rows, ratio, group)
    for numbers, kept in zip(groups(rows, group), groups(mask, group), strict=True):
        each = max(1, round(len(numbers) * ratio / 2))
        order = numbers.argsort()
        expected = torch.zeros_like(kept)
        expected[order[:each]] = expected[order[-each:]] = True
        assert torch.equal(kept, expected)


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS))
@pytest.mark.parametrize("group", GRANULARITIES)
def test_apply_writes_them_back(group: str, seed: int, dim: int) -> None:
    rows = normal(seed, LAYERS, HEADS, TOKENS, dim) * 10
    outliers, mask = split_outliers(rows, 0.05, group)
    for layer in range(LAYERS):
        for first, last in ((0, TOKENS), (2, 4)):
            got = torch.full((HEADS, last - first, dim), 0.25)
            outliers.apply(got, layer, first)
            here = mask[layer, :, first:last]
            assert torch.equal(got[here], rows[layer, :, first:last][here].half().float())
            assert bool((got[~here] == 0.25).all())


@pytest.mark.parametrize(
    ("group", "dim", "index"), [("head", 64, 1), ("head", 256, 1), ("layer", 128, 2), ("token", 64, 2)]
)
def test_values_and_indices_are_counted(group: str, dim: int, index: int) -> None:
    rows = normal(0, LAYERS, HEADS, TOKENS, dim)
    outliers, mask = split_outliers(rows, 0.1, group)
    assert outliers.nbytes == int(mask.sum()) * (2 + index)


def test_cat_and_narrow_go_along_the_tokens() -> None:
    rows = normal(0, LAYERS, HEADS, TOKENS, 32)
    whole, _ = split_outliers(rows, 0.1, "layer")
    again = whole.narrow(0, 2).cat(whole.narrow(2, TOKENS))
    assert torch.equal(again.index, whole.index)
    assert torch.equal(again.value, whole.value)
    assert whole.narrow(0, 2).nbytes * TOKENS == whole.nbytes * 2


def test_constant_groups_have_outliers_too() -> None:
    outliers, mask = split_outliers(torch.full((1, 1, 2, 32), 3.0), 0.01, "head")
    assert bool((outliers.value == 3).all())
    assert 1 <= int(mask[0, 0, 0].sum()) <= 2


def test_what_half_precision_cannot_hold_is_refused() -> None:
    rows = normal(0, 1, 1, 2, 32)
    rows[0, 0, 1, 3] = 1e5
    with pytest.raises(QuantizationError, match="half precision"):
        split_outliers(rows, 0.01, "head")
