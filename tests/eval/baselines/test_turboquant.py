"""TurboQuant: its codebooks, its norms and its bytes are those of its description."""

from __future__ import annotations

import pytest
import torch

from qaq_core.base.pages import KEY
from qaq_core.cache.presets import make_method
from qaq_core.quantization import Outliers
from qaq_eval.baselines.index_codes import IndexCodec, packable
from qaq_eval.baselines.turboquant import TurboQuantMethod, lloyd_max, quantized_keys, quantized_values
from tests.core.rows import normal
from tests.core.tiny_models import tiny

# J. Max, Quantizing for minimum distortion (1960), table 1: positive levels of N(0, 1), and mean squared errors.
MAX_1960 = {
    1: ([0.7980], 0.3634),
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


def unpacked(index: torch.Tensor, bits: int) -> torch.Tensor:
    """What the packed path makes of rows of indices: 8-bit codes, cut to `bits`, then levels."""
    codec = IndexCodec()
    codes = codec.codes(packable(index, bits)) >> (8 - bits)
    assert torch.equal(codes.float(), index)
    return codec.levels(bits)[codes.long()]


def restored(index: torch.Tensor, parameters: Outliers, bits: int) -> torch.Tensor:
    rows = unpacked(index, bits)
    for layer, own in enumerate(rows):
        parameters.apply(own, layer, 0)
    return rows


@pytest.mark.parametrize("bits", MAX_1960)
def test_levels_are_those_of_the_literature(bits: int) -> None:
    levels, (positive, error) = lloyd_max(bits), MAX_1960[bits]
    assert levels[2 ** (bits - 1) :].tolist() == pytest.approx(positive, rel=1e-3)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-9)
    infinity = torch.tensor([torch.inf], dtype=torch.float64)
    mass = torch.special.ndtr(torch.cat([(levels[1:] + levels[:-1]) / 2, infinity])).diff(prepend=torch.zeros(1))
    assert float(1 - (mass * levels**2).sum()) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_nearly_fit_a_coordinate_of_a_random_direction(bits: int) -> None:
    """The paper's density is (1 - x²)^((d-3)/2); each level is nearly the mean of its cell under it, at d = 64."""
    levels, dim = lloyd_max(bits), 64
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    density = (1 - x**2 / dim).clamp_min(0) ** ((dim - 3) / 2)
    cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    mass, first = (
        torch.zeros(2**bits, dtype=torch.float64).index_add_(0, cell, part) for part in (density, density * x)
    )
    torch.testing.assert_close(first / mass, levels, rtol=0.03, atol=0.005)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_key_by_hand(bits: int) -> None:
    """All coordinates have the same size, 2: whatever level they get, the norm (8) brings them back."""
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0] * 4)
    index, norms = quantized_keys((2 * signs).view(1, 1, 1, 16), bits)
    nearest = int((lloyd_max(bits) - 1).abs().argmin())
    assert index.unique().tolist() == [2**bits - 1 - nearest, nearest]
    assert float(norms.value) == pytest.approx(8 / (4 * float(lloyd_max(bits)[nearest])), rel=1e-3)
    torch.testing.assert_close(restored(index, norms, bits)[0, 0, 0], 2 * signs, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_norms_are_kept_and_directions_err_as_much_as_the_codebook_says(bits: int, error: float) -> None:
    rows = normal(bits, 2, 3, 400, 64) * torch.logspace(-1, 2, 400).unsqueeze(-1)
    index, norms = quantized_keys(rows, bits)
    got = restored(index, norms, bits)
    torch.testing.assert_close(got.norm(dim=-1), rows.norm(dim=-1), rtol=1e-3, atol=1e-4)
    # At the same norm the error is 2 - 2·cos, and cos² is 1 - error.
    expected = 2 - 2 * (1 - error) ** 0.5
    relative = ((got - rows).norm(dim=-1) / rows.norm(dim=-1)) ** 2
    assert float(relative.mean()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("bits", [3, 4])
def test_values_by_hand(bits: int) -> None:
    top = 2**bits - 1
    rows = (torch.arange(16) % (top + 1)).float() / 2 - 3  # minimum -3, step ½: exact
    index, ranges = quantized_values(rows.view(1, 1, 1, 16), bits)
    assert (float(ranges.index), float(ranges.value)) == (-3.0, 0.5)
    assert torch.equal(restored(index, ranges, bits)[0, 0, 0], rows)
    rows = normal(bits, 2, 2, 30, 64)
    index, ranges = quantized_values(rows, bits)
    half_step = (rows.amax(-1) - rows.amin(-1)).unsqueeze(-1) / top / 2
    assert bool(((restored(index, ranges, bits) - rows).abs() <= half_step * 1.01 + 6e-3).all())


def test_bytes_beside_the_codes() -> None:
    """vLLM's slots: 2 bytes of a key, 4 of a value."""
    rows = normal(0, 2, 3, 10, 64)
    assert quantized_keys(rows, 3)[1].nbytes == 2 * 2 * 3 * 10
    assert quantized_values(rows, 3)[1].nbytes == 4 * 2 * 3 * 10


@pytest.mark.parametrize(("name", "bits"), [("turboquant-4bit", (4, 4)), ("turboquant-k3v4", (3, 4))])
def test_forms(name: str, bits: tuple[int, int]) -> None:
    method = make_method(tiny("llama-gqa"), "tiny", name)
    assert isinstance(method, TurboQuantMethod)
    assert method.bits == bits
    originals = normal(1, 3, 2, 2, 40, 32)
    rows, _, parameters = method.prepare(method.quantizer, originals, 0)
    for side, own in enumerate(parameters):
        assert own is not None
        got = restored((rows[side] * 2 ** bits[side] - 0.5), own, bits[side])
        if side == KEY:  # rotated back
            got = got @ torch.linalg.inv(method.quantizer.transform.matrices[KEY])  # type: ignore[attr-defined]
        error = ((got - originals[:, side]).norm() / originals[:, side].norm()) ** 2
        assert float(error) < {3: 0.05, 4: 0.02}[bits[side]]


def test_parameters_of_part_of_the_tokens() -> None:
    rows = normal(4, 2, 3, 64, 32)
    index, whole = quantized_values(rows, 4)
    joined = quantized_values(rows[:, :, :24], 4)[1].cat(quantized_values(rows[:, :, 24:], 4)[1])
    assert torch.equal(joined.value, whole.value)
    part = whole.narrow(8, 40)
    assert part.nbytes == 2 * 3 * 32 * 4
    expected = restored(index, whole, 4)[1, :, 8:40]
    got = unpacked(index, 4)[1, :, 8:40].clone()
    part.apply(got, 1, 0)
    assert torch.equal(got, expected)
    got = unpacked(index, 4)[1, :, 8:40].clone()
    whole.apply(got, 1, 8)
    assert torch.equal(got, expected)
    assert whole.narrow(0, 0).nbytes == 0
