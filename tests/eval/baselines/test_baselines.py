"""Rivals: what they pack is what their papers say."""

from __future__ import annotations

import pytest
import torch

from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache.presets import make_method
from qaq_eval import baselines
from qaq_eval.baselines.kivi import GROUP_TOKENS, Groups, UnitCodec
from tests.core.rows import normal
from tests.core.tiny_models import tiny


@pytest.mark.parametrize("name", ["uniform-3", "hadamard-2", "k4v2", "kivi-2", "h2o-0.2", "scissorhands-.5"])
def test_names(name: str) -> None:
    assert baselines.find(name) is not None
    assert make_method(tiny("llama-gqa"), "tiny", name).preset == name


@pytest.mark.parametrize(
    "name", ["uniform", "uniform-", "uniform-x", "k4", "hadamard-3-", "kivi-2.5", "h2o-x", "h2o-1.2.3"]
)
def test_other_names(name: str) -> None:
    assert baselines.find(name) is None


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("side", [KEY, VALUE])
def test_kivi_rounds_to_the_nearest_level_of_the_group(side: int, bits: int) -> None:
    rows = normal(bits, 2, 3, 3 * GROUP_TOKENS, 64) * torch.logspace(-2, 2, 64)
    rows[0, 0, :, 5] = 7.0  # a channel that never changes
    groups, codec = Groups.of(side, rows), UnitCodec(bits)
    levels = codec.levels(bits)[(codec.codes(groups.units(rows)) >> (8 - bits)).long()]
    split = rows.unflatten(2, (-1, GROUP_TOKENS)) if side == KEY else rows.unflatten(3, (-1, GROUP_TOKENS))
    dim = 3 if side == KEY else -1
    span = (split.amax(dim, keepdim=True) - split.amin(dim, keepdim=True)).expand_as(split).reshape(rows.shape)
    for layer in range(2):
        got = levels[layer].clone()
        groups.apply(got, layer, 0)
        # Half a step, and what rounding the minimum and the span to half precision takes away.
        most = span[layer] / (2**bits - 1) / 2 * 1.001 + 2e-3 * rows[layer].abs().amax()
        assert bool(((got - rows[layer]).abs() <= most).all())


@pytest.mark.parametrize("side", [KEY, VALUE])
def test_kivi_groups_of_part_of_the_tokens(side: int) -> None:
    rows = normal(side, 2, 3, 4 * GROUP_TOKENS, 64)
    whole = Groups.of(side, rows)
    joined = Groups.of(side, rows[:, :, :GROUP_TOKENS]).cat(Groups.of(side, rows[:, :, GROUP_TOKENS:]))
    assert torch.equal(joined.index, whole.index)
    assert torch.equal(joined.value, whole.value)
    units = whole.units(rows)
    got = units[1, :, GROUP_TOKENS : 3 * GROUP_TOKENS].clone()
    whole.apply(got, 1, GROUP_TOKENS)
    torch.testing.assert_close(got, rows[1, :, GROUP_TOKENS : 3 * GROUP_TOKENS], atol=1e-5, rtol=1e-5)
    part = whole.narrow(GROUP_TOKENS, 3 * GROUP_TOKENS)
    got = units[1, :, GROUP_TOKENS : 3 * GROUP_TOKENS].clone()
    part.apply(got, 1, 0)
    torch.testing.assert_close(got, rows[1, :, GROUP_TOKENS : 3 * GROUP_TOKENS], atol=1e-5, rtol=1e-5)
    assert whole.narrow(0, 0).nbytes == 0
    # Minimum and span in half precision for 32 numbers.
    assert whole.nbytes == rows.numel() // GROUP_TOKENS * 4
