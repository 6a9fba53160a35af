"""Transforms: what centering and whitening take from the scores is given back, and rows do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.base.pages import KEY, VALUE
from qaq_core.quantization.transforms import IdentityTransform, LinearTransform
from qaq_core.quantization.transforms.hadamard import hadamard
from tests.core.rows import HEAD_DIMS, linear_transform, normal


def rope(vector: torch.Tensor, frequencies: torch.Tensor, position: int) -> torch.Tensor:
    """Rotary embedding of one vector [d], pair by pair."""
    out = vector.clone().double()
    half = len(vector) // 2
    for i, frequency in enumerate(frequencies.tolist()):
        angle = torch.tensor(position * frequency, dtype=torch.float64)
        a, b = vector[i].double(), vector[i + half].double()
        out[i], out[i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


@pytest.mark.parametrize("dim", [8, 16, *HEAD_DIMS])
def test_hadamard_is_orthogonal_in_blocks_and_the_same_everywhere(dim: int) -> None:
    matrix = hadamard(dim)
    block = dim & -dim
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, hadamard(dim))
    for first in range(0, dim, block):
        inside = matrix[first : first + block, first : first + block]
        assert torch.allclose(inside.abs(), torch.full((block, block), block**-0.5, dtype=torch.float64))
    assert set(matrix[0].sign().tolist()) == {-1.0, 1.0} if block == dim else {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_key_rows_are_the_formula(dim: int) -> None:
    transform = linear_transform(2, 2, dim, kinds=2)
    keys = normal(0, 2, 2, 1, dim)
    for layer, head, position in ((0, 1, 0), (1, 0, 77), (1, 1, 3001)):
        row = transform.rows(KEY, keys, position)[layer, head, 0]
        mean = rope(transform.key_mean[layer, head], transform.frequencies[layer], position)
        expected = transform.key_matrix[layer, head].double() @ (keys[layer, head, 0].double() - mean)
        assert torch.allclose(row.double(), expected, atol=2e-5)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_value_rows_are_the_formula(dim: int) -> None:
    transform = linear_transform(2, 2, dim)
    values = normal(0, 2, 2, 3, dim)
    for layer in range(2):
        for head in range(2):
            centered = values[layer, head].double() - transform.value_mean[layer, head].double()
            expected = centered @ transform.value_matrix[layer, head].double().T
            assert torch.allclose(transform.rows(VALUE, values, 9)[layer, head].double(), expected, atol=2e-5)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@given(seed=st.integers(0, 1 << 20), dim=st.sampled_from(HEAD_DIMS), start=st.sampled_from((0, 40, 5000)))
def test_scores_and_outputs_are_restored(seed: int, dim: int, start: int) -> None:
    """Against float64 on the originals: a relative error of 1e-5 is that of float32 sums."""
    layers, heads, group, n = 2, 2, 3, 9
    transform = linear_transform(layers, heads, dim, seed, kinds=2)
    keys, values = normal(seed + 1, layers, heads, n, dim), normal(seed + 2, layers, heads, n, dim)
    key_rows, value_rows = transform.rows(KEY, keys, start), transform.rows(VALUE, values, start)
    query = normal(seed + 3, heads * group, 4, dim)
    weights = torch.rand(heads * group, 4, n, generator=torch.Generator().manual_seed(seed))
    for layer in range(layers):
        wide = [x[layer].repeat_interleave(group, 0) for x in (keys, values, key_rows, value_rows)]
        center = transform.center_scores(layer, query, start, start + n)
        assert center is not None
        scores = transform.query(layer, query) @ wide[2].transpose(1, 2) + center
        assert relative(scores, query.double() @ wide[0].double().transpose(1, 2)) < 1e-5
        taken = transform.value_center(layer)
        assert taken is not None
        centers = weights.sum(-1, keepdim=True) * taken.repeat_interleave(group, 0).unsqueeze(1)
        output = transform.restore(layer, weights @ wide[3]) + centers
        assert relative(output, weights.double() @ wide[1].double()) < 1e-5


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_center_scores_are_made_of_the_center(dim: int) -> None:
    """q·RoPE(μ, t), from the means and angles that kernels are given."""
    transform = linear_transform(2, 2, dim, kinds=2)
    query = normal(0, 4, 1, dim)
    for layer in range(2):
        made = transform.center(layer, 30)
        scores = transform.center_scores(layer, query, 20, 30)
        assert made is not None
        assert scores is not None
        mean, angles = made
        assert angles.shape[0] >= 30
        for position in range(20, 30):
            for head in range(4):
                center = rope(mean[head // 2], transform.frequencies[layer], position)
                expected = float(query[head, 0].double() @ center)
                assert float(scores[head, 0, position - 20]) == pytest.approx(expected, abs=2e-4)


@given(
    seed=st.integers(0, 1 << 30),
    dim=st.sampled_from(HEAD_DIMS),
    side=st.sampled_from((KEY, VALUE)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
)
def test_a_row_is_the_same_bits_alone_and_in_a_batch(seed: int, dim: int, side: int, dtype: torch.dtype) -> None:
    """The worker makes rows of whole blocks, the cache service of scattered ones."""
    layers, heads, n, start = 3, 2, 37, 11
    transform = linear_transform(layers, heads, dim, kinds=2)
    originals = (normal(seed, layers, heads, n, dim) * 5).to(dtype)
    block = transform.rows(side, originals, start)
    pick = torch.randperm(layers * heads * n, generator=torch.Generator().manual_seed(seed))[:50]
    layer, head, token = torch.unravel_index(pick, (layers, heads, n))
    elsewhere = LinearTransform(**transform.tensors())
    together = elsewhere.rows_at(side, originals[layer, head, token], layer, head, token + start)
    assert torch.equal(together, block[layer, head, token])
    for i in range(3):
        at = [part[i : i + 1] for part in (layer, head, token + start)]
        alone = elsewhere.rows_at(side, originals[layer, head, token][i : i + 1], *at)
        assert torch.equal(alone[0], together[i])


def test_rows_of_nothing_are_nothing() -> None:
    transform, none = linear_transform(2, 2, 32), torch.zeros(0, dtype=torch.long)
    for side in (KEY, VALUE):
        assert transform.rows(side, torch.empty(2, 2, 0, 32), 5).shape == (2, 2, 0, 32)
        assert transform.rows_at(side, torch.empty(0, 32), none, none, none).shape == (0, 32)


def test_the_plain_frame_changes_nothing() -> None:
    transform, rows = IdentityTransform(), normal(0, 2, 3, 5, 16)
    nothing = torch.zeros(3, dtype=torch.long)
    assert torch.equal(transform.rows(KEY, rows.half(), 7), rows.half().float())
    assert torch.equal(
        transform.rows_at(KEY, rows[0, :, 0].half(), nothing, nothing, nothing), rows[0, :, 0].half().float()
    )
    assert transform.query(0, rows) is rows
    assert transform.center_scores(0, rows, 0, 5) is None
    assert transform.center(0, 5) is None
    assert transform.restore(0, rows) is rows
    assert transform.value_center(0) is None
    assert transform.centered_on(rows, 0) is transform


def test_a_sequence_is_centered_on_its_own_means() -> None:
    """Rows of tokens that share a large offset, before RoPE, are small; what is restored is the same."""
    layers, heads, dim, n, start = 2, 2, 32, 400, 50
    model = linear_transform(layers, heads, dim, kinds=2)
    offset = 20 * normal(3, layers, 2, heads, dim)
    rotated = [
        rope(offset[layer, KEY, head], model.frequencies[layer], start + t)
        for layer in range(layers)
        for head in range(heads)
        for t in range(n)
    ]
    keys = torch.stack(rotated).view(layers, heads, n, dim) + normal(4, layers, heads, n, dim)
    values = offset[:, VALUE].unsqueeze(2) + normal(5, layers, heads, n, dim)
    own = model.centered_on(torch.stack([keys, values], 1).float(), start)
    for side, originals in ((KEY, keys), (VALUE, values)):
        before, after = (transform.rows(side, originals.float(), start).square().mean() for transform in (model, own))
        assert after < 0.05 * before
    query = normal(6, heads, 1, dim)
    for layer in range(layers):
        centers = own.center_scores(layer, query, start, start + n)
        assert centers is not None
        scores = own.query(layer, query) @ own.rows(KEY, keys.float(), start)[layer].mT + centers
        assert relative(scores, query.double() @ keys[layer].double().mT) < 1e-4


def test_few_tokens_move_the_means_little() -> None:
    model = linear_transform(1, 1, 32)
    own = model.centered_on(torch.full((1, 2, 1, 1, 32), 33.0), 0)
    assert float((own.value_mean - model.value_mean).abs().max()) < 2.0
