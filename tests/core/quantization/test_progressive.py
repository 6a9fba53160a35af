"""Progressive codes: the order of units, two scales a row, and how far a decoded row may be from the row."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.base.errors import QuantizationError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.quantization.bit_planes import LevelTable, round_robin, unpack_half
from qaq_core.quantization.codecs import GaussianCodec, ProgressiveCodec
from qaq_core.quantization.codecs.progressive import LOG2_SCALES, greedy_order
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform
from tests.core.rows import HEAD_DIMS, normal, orders

CPU = torch.device("cpu")
LEVELS = [GaussianCodec().levels(bits) for bits in range(1, 9)]
EDGES = [1.57 * torch.special.ndtri(torch.arange(1, 1 << b, dtype=torch.float64) / (1 << b)) for b in range(1, 9)]


def distortion(planes: list[int]) -> list[float]:
    return [GaussianCodec().distortion(bits) for bits in planes]


@given(seed=st.integers(0, 1 << 30), octets=st.integers(1, 4), spread=st.floats(0, 4))
def test_every_prefix_of_the_order_is_the_best_of_its_size(seed: int, octets: int, spread: float) -> None:
    """Against every way to give that many planes to the octets."""
    costs = (spread * normal(seed, octets)).exp()
    order = greedy_order(costs)
    assert sorted(order) == sorted([*range(octets)] * 8)
    weights = (costs / costs.mean()).double()
    table = torch.tensor(distortion(list(range(9))), dtype=torch.float64)
    ways = torch.cartesian_prod(*[torch.arange(9)] * octets).view(-1, octets)
    lost = (table[ways] * weights).sum(-1)
    for units in range(len(order) + 1):
        mine = sum(
            float(weights[octet]) * GaussianCodec().distortion(order[:units].count(octet)) for octet in range(octets)
        )
        assert mine == pytest.approx(float(lost[ways.sum(-1) == units].min()), rel=1e-9, abs=1e-12)


def test_heads_that_cost_alike_are_averaged_and_their_size_does_not_count() -> None:
    costs = torch.tensor([4.0, 1.0])
    order = greedy_order(costs)
    assert greedy_order(costs * 1e-6) == order
    assert greedy_order(torch.stack([costs, 1000 * costs]).view(1, 2, 2)) == order
    assert greedy_order(torch.stack([costs, costs.flip(0)])) == round_robin(16).tolist()
    assert order[0] == 0
    assert order[-1] == 1


@given(dim=st.sampled_from(HEAD_DIMS), logs=st.tuples(*[st.floats(-9, 11.9)] * 2))
def test_each_part_of_a_row_has_the_nearest_scale_of_the_table(dim: int, logs: tuple[float, float]) -> None:
    codec = ProgressiveCodec(orders(dim))
    rows = normal(0, 1, 1, 1, dim)
    parts = (rows[..., : codec.first_dims], rows[..., codec.first_dims :])
    for part, log in zip(parts, logs, strict=True):
        part.mul_(2.0**log / part.square().mean().sqrt())
    meta = codec.meta(rows, None)
    assert (meta.dtype, meta.shape) == (torch.uint8, (1, 1, 1, 1))
    scales, offset = codec.affine(meta)
    assert offset is None
    for scale, log in zip(scales[0, 0, 0].log2().tolist(), logs, strict=True):
        away = [abs(entry - log) for entry in LOG2_SCALES]
        assert abs(scale - log) == pytest.approx(min(away), abs=1e-4)


@given(
    seed=st.integers(0, 1 << 30),
    dim=st.sampled_from(HEAD_DIMS),
    side=st.sampled_from((KEY, VALUE)),
    kind=st.sampled_from(("typical", "small", "huge", "constant", "one", "zero")),
)
@pytest.mark.parametrize("width", WIDTHS[1:])
def test_a_number_errs_by_its_cell_and_beyond_the_last_by_what_is_beyond(
    width: int, seed: int, dim: int, side: int, kind: str
) -> None:
    """encode, pack, unpack, decode: of every octet's planes, and nothing else is lost."""
    n = 7
    base = normal(seed, 1, 1, n, dim)
    one = torch.nn.functional.one_hot(torch.arange(n) % dim, dim).float().view(1, 1, n, dim)
    size = 2.0 ** torch.linspace(0, 11, n).view(1, 1, n, 1)
    rows = {
        "typical": base,
        "small": base / 2.0**20,
        "huge": base / base.square().mean(-1, keepdim=True).sqrt() * size * 0.5,
        "constant": torch.full_like(base, 1.3) * size / 8,
        "one": one * size,
        "zero": torch.zeros_like(base),
    }[kind]
    codec = ProgressiveCodec(orders(dim))
    quantizer = Quantizer(IdentityTransform(), codec)
    meta = codec.meta(rows, None)[0, 0]
    packed = quantizer.encode(side, rows[0, 0], meta, 0, width)
    scale = quantizer.spread(codec.affine(meta)[0], dim)
    units = (rows[0, 0] / scale).double()
    got = torch.empty(n, dim)
    if width == HALF:
        assert bool(((unpack_half(packed).double() - units).abs() <= 2**-11 * units.abs() + 2**-25).all())
        return
    layout = quantizer.layout(side, dim)
    LevelTable(LEVELS, layout, CPU).unpack(packed, width, got)
    for octet, planes in enumerate(layout.planes[width].tolist()):
        mine, levels = units[:, 8 * octet : 8 * octet + 8], got[:, 8 * octet : 8 * octet + 8].double()
        if not planes:
            assert not bool(levels.any())
            continue
        # Cells end at their edges; the two outer ones at the last level, beyond which numbers are clipped.
        edges, ends = EDGES[planes - 1], LEVELS[planes - 1].double()
        low, high = torch.cat([ends[:1], edges]), torch.cat([edges, ends[-1:]])
        cell = torch.bucketize(levels, edges)
        widest = torch.maximum(high[cell] - levels, levels - low[cell])
        beyond = (mine.abs() - ends[-1]).clamp_min(0)
        assert bool(((levels - mine).abs() <= torch.maximum(widest, beyond) + 1e-4).all())
    # A part's rms is at most 8 of its scale (half of the widest step of the table), so what is clipped is bounded.
    for part in (slice(0, codec.first_dims), slice(codec.first_dims, dim)):
        assert float(units[:, part].square().mean(-1).sqrt().max()) <= 8.001


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), log=st.floats(-2.4, 2.0))
def test_typical_rows_err_as_the_distortion_says(seed: int, dim: int, log: float) -> None:
    """Within the fine steps of the table, where a scale is off by at most a sixth of an octave."""
    codec = ProgressiveCodec(orders(dim))
    quantizer = Quantizer(IdentityTransform(), codec)
    rows = normal(seed, 1, 1, 400, dim) * 2.0**log
    meta = codec.meta(rows, None)[0, 0]
    scale = quantizer.spread(codec.affine(meta)[0], dim)
    got = torch.empty(400, dim)
    for side, width in itertools.product((KEY, VALUE), (2, 5, 8)):
        layout = quantizer.layout(side, dim)
        packed = quantizer.encode(side, rows[0, 0], meta, 0, width)
        LevelTable(LEVELS, layout, CPU).unpack(packed, width, got)
        expected = torch.tensor(distortion(layout.planes[width].tolist())).repeat_interleave(8) * scale.square()
        lost = (got * scale - rows[0, 0]).square()
        assert float(lost.mean()) == pytest.approx(float(expected.mean()), rel=0.25)


@pytest.mark.parametrize("part", [0, 1])
def test_rows_over_the_last_scale_are_refused_naming_the_layer(part: int) -> None:
    codec = ProgressiveCodec(orders(64))
    rows = torch.ones(3, 2, 4, 64)
    place = 0 if part == 0 else codec.first_dims
    rows[2, 1, 3, place : place + 8] = 4096.0 * 64
    with pytest.raises(QuantizationError, match="layer 2: a row is over 4096 times"):
        codec.meta(rows, None)
