"""Baselines: they pack what their papers say."""

from __future__ import annotations

import pytest
import torch

from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache.presets import make_method
from qaq_eval import baselines
from qaq_eval.baselines.kivi import BLOCK, BlockScales, UnitCodec
from tests.core.rows import normal
from tests.core.tiny_models import tiny


@pytest.mark.parametrize(
    "name",
    [
        "uniform-3",
        "hadamard-2",
        "k4v2",
        "kivi-2",
        "kvarn-k4v2",
        "turboquant-k3v4",
        "turboquant-3bit",
        "h2o-0.2",
        "scissorhands-.5",
    ],
)
def test_names(name: str) -> None:
    assert baselines.find_baseline(name) is not None
    assert make_method(tiny("llama-gqa"), "tiny", name).preset == name


@pytest.mark.parametrize(
    "name",
    [
        "uniform",
        "uniform-",
        "uniform-x",
        "k4",
        "hadamard-3-",
        "kivi-2.5",
        "h2o-x",
        "h2o-1.2.3",
        "oscar-3",
        "kvarn-4",
        "turboquant-3",
    ],
)
def test_other_names(name: str) -> None:
    assert baselines.find_baseline(name) is None


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("side", [KEY, VALUE])
def test_kivi_rounds_to_the_nearest_level_of_the_block(side: int, bits: int) -> None:
    rows = normal(bits, 2, 3, 3 * BLOCK, 64) * torch.logspace(-2, 2, 64)
    rows[0, 0, :, 5] = 7.0  # a channel that never changes
    scales, codec = BlockScales.of(side, rows), UnitCodec(bits)
    levels = codec.levels(bits)[(codec.codes(scales.normalize(rows)) >> (8 - bits)).long()]
    split = rows.unflatten(2, (-1, BLOCK)) if side == KEY else rows.unflatten(3, (-1, BLOCK))
    dim = 3 if side == KEY else -1
    span = (split.amax(dim, keepdim=True) - split.amin(dim, keepdim=True)).expand_as(split).reshape(rows.shape)
    for layer in range(2):
        got = levels[layer].clone()
        scales.apply(got, layer, 0)
        # Half a step, and what rounding the minimum and the span to half precision takes away.
        most = span[layer] / (2**bits - 1) / 2 * 1.001 + 2e-3 * rows[layer].abs().amax()
        assert bool(((got - rows[layer]).abs() <= most).all())


@pytest.mark.parametrize("side", [KEY, VALUE])
def test_kivi_blocks_of_part_of_the_tokens(side: int) -> None:
    rows = normal(side, 2, 3, 4 * BLOCK, 64)
    whole = BlockScales.of(side, rows)
    joined = BlockScales.of(side, rows[:, :, :BLOCK]).cat(BlockScales.of(side, rows[:, :, BLOCK:]))
    assert torch.equal(joined.index, whole.index)
    assert torch.equal(joined.value, whole.value)
    units = whole.normalize(rows)
    got = units[1, :, BLOCK : 3 * BLOCK].clone()
    whole.apply(got, 1, BLOCK)
    torch.testing.assert_close(got, rows[1, :, BLOCK : 3 * BLOCK], atol=1e-5, rtol=1e-5)
    part = whole.narrow(BLOCK, 3 * BLOCK)
    got = units[1, :, BLOCK : 3 * BLOCK].clone()
    part.apply(got, 1, 0)
    torch.testing.assert_close(got, rows[1, :, BLOCK : 3 * BLOCK], atol=1e-5, rtol=1e-5)
    assert whole.narrow(0, 0).nbytes == 0
    # Minimum and span in half precision for 32 numbers.
    assert whole.nbytes == rows.numel() // BLOCK * 4
