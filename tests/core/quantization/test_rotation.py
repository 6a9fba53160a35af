"""A sequence's own axes: whatever the reflections were rounded to, they turn, and what is turned comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.quantization.adaptation import MEANS_TOKENS, ROTATION_TOKENS, Adaptation
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import rotation as rotations
from qaq_core.quantization.transforms.rotation import Rotation, fit_rotation
from tests.core.rows import HEAD_DIMS, decoded, normal, quantizers, rotated, rotation


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS))
def test_reflections_are_a_turn(seed: int, dim: int) -> None:
    own, eye = rotation(2, 2, dim, seed), torch.eye(dim, dtype=torch.float64)
    for layer in range(2):
        matrix = own.matrix(layer)
        assert torch.allclose(matrix @ matrix.mT, eye, atol=1e-11)
        expected = eye.repeat(2, 1, 1)
        begin = 0
        for first in range(dim - 1):
            vector = torch.zeros(2, dim, 1, dtype=torch.float64)
            vector[:, first:, 0] = own.reflections[layer, :, begin : begin + dim - first].double()
            length = vector.square().sum((1, 2), keepdim=True).clamp_min(1)
            expected = expected - 2 / length * vector @ (vector.mT @ expected)
            begin += dim - first
        assert torch.allclose(matrix, expected, atol=1e-11)


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS))
def test_rows_are_the_formula_and_scores_and_sums_come_back(seed: int, dim: int) -> None:
    own, rows, query = rotation(2, 3, dim, seed), normal(seed + 1, 3, 7, dim), normal(seed + 2, 3, 2, dim)
    before, after = (part[1].double().repeat_interleave(8, -1).unsqueeze(1) for part in (own.before, own.after))
    made = own.rows(1, rows)
    expected = (rows.double() * before) @ own.matrix(1).mT * after
    assert torch.allclose(made.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(own.head_rows(1, 2, rows[2]), made[2])
    for got, wanted in (
        (query.double() @ own.query_map(1) @ made.double().mT, query.double() @ rows.double().mT),
        (made.double() @ own.output_map(1), rows.double()),
    ):
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def skewed(layers: int, heads: int, tokens: int, dim: int) -> torch.Tensor:
    """Rows that spread in directions of their own."""
    return normal(1, layers, heads, tokens, dim) @ (
        torch.eye(dim) + 1.5 * dim**-0.5 * normal(2, layers, heads, dim, dim)
    )


@pytest.mark.parametrize("dim", [32, 64, 80])
def test_fitted_axes_diagonalize_what_errors_cost_and_octets_have_variance_one(dim: int) -> None:
    rows = skewed(2, 2, 4000, dim)
    costs = (2.0 ** -torch.arange(dim // 8.0)).repeat(2, 2, 1)
    own = fit_rotation(rows, costs)
    made = torch.stack([own.rows(layer, mine) for layer, mine in enumerate(rows)])
    octets = made.square().mean(2).unflatten(-1, (-1, 8)).mean(-1)
    assert torch.allclose(octets, torch.ones_like(octets), atol=0.25)
    for layer in range(2):
        along = made[layer].double() / own.after[layer].double().repeat_interleave(8, -1).unsqueeze(1)
        covariance = along.mT @ along / 4000
        for head in range(2):
            blocks = covariance[head].unflatten(0, (-1, 8)).unflatten(-1, (-1, 8)).square().sum((1, 3))
            assert float((blocks.sum() - blocks.diagonal().sum()) / blocks.sum()) < 2e-3
            powers = covariance[head].diagonal().unflatten(-1, (-1, 8)).mean(-1)
            assert bool((powers[1:] <= powers[:-1] * 1.02).all())


@pytest.mark.parametrize("dim", [16, 64, 80])
def test_the_product_of_fitted_reflections_is_their_rotation(dim: int) -> None:
    """Also of one that reflects nothing, as of rows that spread along their dims already."""
    vectors, _ = torch.linalg.qr(normal(3, 2, 3, dim, dim).double())
    vectors[0, 0] = torch.eye(dim)
    reflections = rotations._reflections(vectors)
    ones = torch.ones(2, 3, dim // 8)
    own = Rotation(reflections, ones, ones)
    product = rotations._product(reflections, dim)
    assert not reflections[0, 0].any()
    for layer in range(2):
        assert torch.allclose(product[layer], own.matrix(layer), atol=1e-12)


def test_the_same_bits_lose_less_along_own_axes() -> None:
    """Of rows whose directions are not the frame's, at two bits; errors are weighed in the model's frame."""
    model = quantizers(2, 2, 64)["balanced"]
    originals = torch.stack([skewed(2, 2, 2000, 64)] * 2, 1)
    costs = (2.0 ** (-torch.arange(8.0) / 1.5)).repeat(2, 2, 1)
    plain = model.centered_on(originals, 0)
    own = Adaptation((costs, costs))(model, originals, 0)
    lost = []
    for quantizer in (plain, own):
        rows = quantizer.rows(VALUE, originals[:, VALUE], 0)
        meta = quantizer.meta(rows)
        seen = decoded(quantizer, VALUE, rows.view(-1, 64), meta.reshape(-1, 1), 4).view(rows.shape)
        errors = [quantizer.transform.restore(layer, seen[layer] - rows[layer]) for layer in range(2)]
        matrix = model.transform.tensors()["value_matrix"].float()
        weighed = torch.stack(errors) @ matrix.mT
        lost.append(float((weighed.square() * costs.repeat_interleave(8, -1).unsqueeze(2)).mean()))
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize("tokens", [MEANS_TOKENS - 1, MEANS_TOKENS, 64 * ROTATION_TOKENS - 1, 64 * ROTATION_TOKENS])
def test_short_sequences_take_less(tokens: int) -> None:
    model = quantizers(1, 1, 64)["balanced"]
    adaptation = Adaptation((torch.ones(1, 1, 8), torch.ones(1, 1, 8)))
    originals = normal(3, 1, 2, 1, tokens, 64)
    own = adaptation(model, originals, 4)
    assert (own is model) == (tokens < MEANS_TOKENS)
    assert (getattr(own.transform, "rotation", None) is not None) == (tokens >= 64 * ROTATION_TOKENS)
    assert getattr(replace(adaptation, rotation=False)(model, originals, 4).transform, "rotation", None) is None


def test_axes_are_a_sequences_own_and_counted() -> None:
    model = quantizers(2, 3, 64)["balanced"]
    own = rotated(model)
    numbers = 64 * 65 // 2 - 1 + 2 * 8 * 4
    assert own.own_bytes == 2 * 2 * 3 * (numbers + 64 * 4)
    again = Quantizer.from_bytes(own.to_bytes(), model)
    originals = normal(5, 2, 3, 9, 64)
    assert again.id == own.id != model.id
    for side in (KEY, VALUE):
        assert torch.equal(again.rows(side, originals, 70), own.rows(side, originals, 70))


def test_matrices_are_made_once_and_counted_from_then_on() -> None:
    model = quantizers(2, 3, 64)["balanced"]
    own = rotated(model)
    before, query = own.own_bytes, normal(1, 6, 1, 64)
    assert model.transform.kept_bytes == 0
    made = own.transform.query(0, query)
    assert own.own_bytes == before + 2 * 2 * 3 * 64 * 64 * 4
    with pytest.MonkeyPatch.context() as patched:
        patched.delattr(Rotation, "matrix")
        assert torch.equal(own.transform.query(0, query), made)
        assert own.transform.restore(1, query).shape == query.shape
    assert rotated(model).own_bytes == before


def test_what_does_not_fit_is_refused() -> None:
    good = rotation(2, 2, 64)
    with pytest.raises(ConfigError, match="64 dims"):
        Rotation(good.reflections[..., 1:], good.before, good.after)
    for wrong in (
        (good.reflections.half(), good.before, good.after),
        (good.reflections, good.before.half(), good.after),
    ):
        with pytest.raises(ConfigError, match="int8"):
            Rotation(*wrong)
    model = quantizers(2, 3, 64)["balanced"]
    with pytest.raises(ConfigError, match="3 KV heads"):
        model.centered_on(normal(1, 2, 2, 3, 70, 64), 0).rotated((good, good))


def test_a_head_whose_vectors_are_nothing_has_axes_too() -> None:
    """A pruned head: every direction is as good as any other, and nothing overflows."""
    rows = torch.zeros(1, 2, 2000, 32)
    rows[:, 1] = normal(1, 1, 2000, 32)
    own = fit_rotation(rows, torch.zeros(1, 2, 4))
    assert all(bool(torch.isfinite(part).all()) for part in (own.before, own.after))
    assert bool(torch.isfinite(own.rows(0, rows[0])).all())
