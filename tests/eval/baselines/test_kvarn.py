"""KVarN: tiles are made even, outlying tokens do no harm, and the bytes are those of its description."""

from __future__ import annotations

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache.presets import make_method
from qaq_eval.baselines.kvarn import TILE, even_scales, quantized, unevenness
from qaq_eval.quality.run import with_residual_window
from tests.core.rows import normal
from tests.core.tiny_models import tiny
from tests.eval.baselines.test_turboquant import restored, unpacked


def test_scales_by_hand() -> None:
    """A chessboard of ±1 has rows and columns of equal deviation; what it is multiplied with is found."""
    board = (-1.0) ** torch.arange(8).add(torch.arange(8)[:, None])
    rows = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.2, 1.2, 1.2, 1.2])[:, None]  # pairs, so that columns have a mean of 0
    columns = torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0])[None]
    tile = board * rows * columns
    along, across = even_scales(tile)
    deviation = (8 / 7) ** 0.5  # of a row of the board, with n - 1
    torch.testing.assert_close(tile / along / across, board / deviation, rtol=1e-4, atol=1e-5)
    assert float(unevenness(tile)) == pytest.approx(1.2 + 3, rel=1e-5)
    assert float(unevenness(tile / along / across)) == pytest.approx(2, rel=1e-4)
    # The first round divides columns by c·√(Σr²/7), then rows by what is left.
    first = (9.76 / 7) ** 0.5
    assert across[0].tolist() == pytest.approx([c * first for c in columns[0].tolist()], rel=1e-4)
    assert along[:, 0].tolist() == pytest.approx([r * deviation / first for r in rows[:, 0].tolist()], rel=1e-4)


def test_tiles_do_not_become_less_even() -> None:
    tiles = normal(5, 20, 16, 32) * torch.logspace(0, 1.5, 32)  # a scale below e^-0.3 is not taken
    along, across = even_scales(tiles)
    before, after = unevenness(tiles), unevenness(tiles / along / across)
    assert bool((after <= before).all())
    assert float(after.mean()) < 2.2 < float(before.mean())
    assert float(unevenness(torch.zeros(4, 4))) == 0


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("side", [KEY, VALUE])
def test_it_rounds_to_the_nearest_level_of_the_row(side: int, bits: int) -> None:
    rows = normal(bits, 2, 2, 2 * TILE, 32) * torch.logspace(-1, 1, 32)
    index, scales = quantized(side, rows, bits)
    got = restored(index, scales, bits)
    assert index.min() == 0
    assert index.max() == 2**bits - 1
    for layer in range(2):
        step, across = (scales.of_tokens(name, layer, 0, 2 * TILE) for name in ("value", "across"))
        most = step * across / 2
        assert bool(((got - rows)[layer].abs() <= most * 1.01 + 5e-3 * rows[layer].abs().amax(-1, True)).all())


@pytest.mark.parametrize("side", [KEY, VALUE])
def test_an_outlying_token_costs_the_others_nothing(side: int) -> None:
    """The scale of a token is its own; with a scale per channel alone, its neighbours would lose their bits."""
    rows = normal(7, 1, 1, TILE, 64)
    loud = rows.clone()
    loud[0, 0, 5] *= 100
    errors = []
    for tile in (rows, loud):
        index, scales = quantized(side, tile, 2)
        lost = (restored(index, scales, 2) - tile).norm(dim=-1) / tile.norm(dim=-1)
        errors.append(lost[0, 0])
    others = torch.arange(TILE) != 5
    assert float(errors[1][others].mean()) < 1.2 * float(errors[0][others].mean())
    assert float(errors[1][5]) < 2 * float(errors[0].mean())


def test_bytes_beside_the_codes() -> None:
    """A tile of keys has 2·head_dim + 128 half-precision numbers, one of values head_dim + 2·128."""
    rows = normal(0, 2, 3, 2 * TILE, 64)
    tiles = 2 * 3 * 2
    assert quantized(KEY, rows, 4)[1].nbytes == tiles * 2 * (2 * 64 + TILE)
    assert quantized(VALUE, rows, 2)[1].nbytes == tiles * 2 * (64 + 2 * TILE)


@pytest.mark.parametrize("side", [KEY, VALUE])
def test_tiles_are_independent(side: int) -> None:
    rows = normal(3, 2, 2, 3 * TILE, 32)
    index, whole = quantized(side, rows, 4)
    first, second = quantized(side, rows[:, :, :TILE], 4), quantized(side, rows[:, :, TILE:], 4)
    assert torch.equal(torch.cat([first[0], second[0]], 2), index)
    joined, expected = first[1].cat(second[1]), restored(index, whole, 4)
    assert torch.equal(restored(index, joined, 4), expected)
    part = whole.narrow(TILE, 3 * TILE)
    got = unpacked(index, 4)[1, :, TILE:].clone()
    part.apply(got, 1, 0)
    assert torch.equal(got, expected[1, :, TILE:])


def test_whole_tiles_are_packed() -> None:
    method = make_method(tiny("llama-gqa"), "tiny", "kvarn-k4v2")
    assert method.pack_tokens == TILE
    assert with_residual_window(method, 2 * TILE).pack_tokens == 2 * TILE
    with pytest.raises(ConfigError, match="tiles of 128 tokens"):
        with_residual_window(method, 64)
    with pytest.raises(ConfigError, match="blocks of 32 tokens"):
        with_residual_window(make_method(tiny("llama-gqa"), "tiny", "kivi-2"), 48)
