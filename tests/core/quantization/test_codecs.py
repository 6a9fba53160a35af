"""Codecs: nested codes, levels, scales, and what they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.base.errors import ConfigError, QuantizationError
from qaq_core.base.pages import KEY
from qaq_core.base.widths import HALF
from qaq_core.quantization.codecs import Codec, GaussianCodec, NormalCodec, ProgressiveCodec, UniformCodec, make_codec
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform
from tests.core.rows import GRANULARITIES, HEAD_DIMS, decoded, normal, orders, quantizers

CODECS: dict[str, Codec] = {
    "gaussian": GaussianCodec(),
    "progressive": ProgressiveCodec(orders(64)),
    "uniform": UniformCodec(),
    "normal": NormalCodec(),
}

# Mean squared error of Lloyd-Max quantizers of a standard normal at 1 to 5 bits (Max 1960).
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


def edges(name: str, bits: int) -> torch.Tensor:
    """Inner cell edges at a width of its own, from the definition of each codec."""
    inner = torch.arange(1, 2**bits, dtype=torch.float64) / 2**bits
    normal_quantiles = torch.special.ndtri(inner)
    return {"uniform": inner, "normal": normal_quantiles}.get(name, 1.57 * normal_quantiles).float()


@given(seed=st.integers(0, 1 << 30))
@pytest.mark.parametrize("name", CODECS)
def test_the_first_b_bits_are_the_b_bit_code(name: str, seed: int) -> None:
    units = normal(seed, 400) * 2
    codes = CODECS[name].codes(units)
    for bits in range(1, 9):
        cell = edges(name, bits)
        # A number on an edge may fall to either side, as floats have it.
        away = ((units[:, None] - cell).abs() > 1e-5).all(-1)
        assert torch.equal((codes >> (8 - bits))[away].long(), torch.bucketize(units[away], cell))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_lie_in_their_cells(name: str, bits: int) -> None:
    levels = CODECS[name].levels(bits)
    assert torch.equal(torch.bucketize(levels, edges(name, bits)), torch.arange(2**bits))


@pytest.mark.parametrize("name", CODECS)
def test_distortion_is_the_measured_error(name: str) -> None:
    codec = CODECS[name]
    units = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) if name == "uniform" else normal(1, 200_000)
    for bits in range(1, 7):
        levels = codec.levels(bits)[(codec.codes(units) >> (8 - bits)).long()]
        measured = float((units - levels).square().mean())
        # The normal codec's levels are the cells' medians, which lose a little against their centroids.
        slack = 1.3 if name == "normal" else 1.03
        assert codec.distortion(bits) * 0.97 < measured < codec.distortion(bits) * slack
    assert codec.distortion(16) == 0


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_nesting_and_the_grid_of_bytes_cost_less_than_four_percent(bits: int) -> None:
    ratio = GaussianCodec().distortion(bits) / LLOYD_MAX[bits]
    assert 0.999 < ratio < (1.02 if bits < 5 else 1.04)


def test_dropping_a_gaussian_row_costs_its_variance_and_more_bits_always_help() -> None:
    codec = GaussianCodec()
    errors = [codec.distortion(bits) for bits in range(9)]
    gains = [a - b for a, b in itertools.pairwise(errors)]
    assert errors[0] == 1
    assert gains == sorted(gains, reverse=True)
    assert min(gains) > 0


@given(exponent=st.floats(-15.9, 11.9), dim=st.sampled_from(HEAD_DIMS))
def test_the_gaussian_scale_is_the_rms_to_four_percent(exponent: float, dim: int) -> None:
    rows = normal(3, 1, 1, 1, dim)
    rows *= 2.0**exponent / rows.square().mean().sqrt()
    scale, offset = GaussianCodec().affine(GaussianCodec().meta(rows, None))
    assert offset is None
    assert float(scale) == pytest.approx(2.0**exponent, rel=0.04)  # half a step is 2^(28/255/2)


@given(
    seed=st.integers(0, 1 << 30),
    dim=st.sampled_from(HEAD_DIMS),
    granularity=st.sampled_from(GRANULARITIES),
    bits=st.integers(1, 8),
)
def test_the_uniform_codec_errs_by_half_a_cell_at_most(seed: int, dim: int, granularity: str, bits: int) -> None:
    rows = normal(seed, 2, 2, 3, dim) * 7 + 2
    quantizer = quantizers(2, 2, dim)[f"uniform-{granularity}"]
    meta = quantizer.codec.meta(rows, None)
    full = meta.expand(2, 2, 3, -1)
    flat = full.reshape(-1, full.shape[-1])
    got = decoded(quantizer, KEY, rows.view(-1, dim), flat, 2 * bits).view(rows.shape)
    scale, _ = quantizer.codec.affine(full)
    # Half-precision parameters: a number may lie that much outside of the range they span.
    rounding = 2**-10 * float(rows.abs().max())
    assert bool(((got - rows).abs() <= scale / 2 ** (bits + 1) + rounding).all())


def test_uniform_by_hand() -> None:
    # min 0, max 8, 2 bits: cells of width 2 with the levels 1, 3, 5, 7.
    rows = torch.tensor([0.0, 1.9, 2.1, 4.5, 5.9, 6.5, 7.0, 8.0]).view(1, 1, 1, 8)
    codec = UniformCodec("head")
    scale, offset = codec.affine(codec.meta(rows, None))
    assert (float(offset), float(scale)) == (0, 8)
    levels = codec.levels(2)[(codec.codes(rows / 8) >> 6).long()] * 8
    assert levels.flatten().tolist() == [1, 1, 3, 5, 5, 7, 7, 7]


def test_normal_by_hand() -> None:
    # Mean 1, deviation 2; one bit: halves at the mean, levels at the quantiles 1/4 and 3/4, ±0.6745 deviations.
    rows = torch.tensor([-1.0, 3.0] * 4).view(1, 1, 1, 8)
    codec = NormalCodec("head")
    scale, offset = codec.affine(codec.meta(rows, None))
    assert (float(offset), float(scale)) == (1, 2)
    levels = 1 + 2 * codec.levels(1)[(codec.codes((rows - 1) / 2) >> 7).long()]
    assert levels.flatten()[:2].tolist() == pytest.approx([1 - 2 * 0.67449, 1 + 2 * 0.67449], abs=1e-4)


@pytest.mark.parametrize(("granularity", "dims"), [("head", (3, 2)), ("layer", (3, 1)), ("token", (1, 1))])
@pytest.mark.parametrize("codec", [UniformCodec, NormalCodec])
def test_groups_span_a_head_a_layer_or_the_token(codec: type, granularity: str, dims: tuple[int, int]) -> None:
    assert codec(granularity).meta(normal(0, 3, 2, 5, 16), None).shape == (*dims, 5, 4)


@pytest.mark.parametrize("codec", [UniformCodec, NormalCodec])
def test_excluded_numbers_do_not_count(codec: type) -> None:
    rows = normal(0, 1, 1, 4, 32)
    loud = rows.clone()
    loud[..., 5] = 1e4
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask[..., 5] = True
    made = codec("head")
    assert torch.equal(made.meta(loud, mask), made.meta(rows, mask))
    assert not torch.equal(made.meta(loud, None), made.meta(rows, None))


@given(value=st.floats(-1000, 1000, width=16), dim=st.sampled_from(HEAD_DIMS))
@pytest.mark.parametrize("name", ["uniform-head", "uniform-layer", "normal-token"])
def test_constant_rows_come_back_at_any_width(name: str, value: float, dim: int) -> None:
    quantizer = quantizers(1, 1, dim)[name]
    rows = torch.full((1, 1, 1, dim), value)
    meta = quantizer.codec.meta(rows, None)
    for width in (2, 6, 16):
        assert decoded(quantizer, KEY, rows[0, 0], meta[0, 0], width) == pytest.approx(
            rows[0, 0], abs=1e-6 + 1e-3 * abs(value)
        )


def test_rows_of_zeros_come_back_near_zero() -> None:
    quantizer = Quantizer(IdentityTransform(), GaussianCodec())
    rows = torch.zeros(1, 1, 1, 64)
    meta = quantizer.codec.meta(rows, None)
    for width in (1, 4, 16, HALF):
        assert float(decoded(quantizer, KEY, rows[0, 0], meta[0, 0], width).abs().max()) < 1e-4


def test_rows_of_zeros_come_back_as_the_smallest_typical_rows_smallest_levels() -> None:
    """Rows are in units of a typical one, and no scale is below 2^-7/3 of it."""
    quantizer = quantizers(1, 1, 64)["balanced"]
    rows = torch.zeros(1, 1, 1, 64)
    meta = quantizer.codec.meta(rows, None)
    for width in (1, 4, 16):
        fewest = int(quantizer.layout(KEY, 64).planes[width].clamp_min(1).min())
        most = 2 ** (-7 / 3) * float(quantizer.codec.levels(fewest).abs().min())
        assert float(decoded(quantizer, KEY, rows[0, 0], meta[0, 0], width).abs().max()) <= most * 1.0001
    assert not bool(decoded(quantizer, KEY, rows[0, 0], meta[0, 0], HALF).any())


@pytest.mark.parametrize("name", ["balanced", "uniform-head", "uniform-layer", "normal-head"])
def test_rows_beyond_the_range_are_refused_naming_the_layer(name: str) -> None:
    rows = normal(0, 3, 1, 4, 32)
    rows[2, 0, 1] *= 1e6
    with pytest.raises(QuantizationError, match="layer 2"):
        quantizers(3, 1, 32)[name].codec.meta(rows, None)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="gaussian, normal, progressive, uniform"):
        make_codec("kmeans")
    with pytest.raises(ConfigError, match="head, layer, token"):
        make_codec("uniform", granularity="batch")


@pytest.mark.parametrize(
    "codec", [GaussianCodec(), ProgressiveCodec(orders(32)), UniformCodec("token"), NormalCodec("head")]
)
def test_settings_make_the_same_codec(codec: Codec) -> None:
    again = make_codec(**codec.settings())  # type: ignore[arg-type]
    assert (type(again), again.settings()) == (type(codec), codec.settings())
