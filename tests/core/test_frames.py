"""Frames: what centering and rotation take from the scores is given back, and rows do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.frames import PlainFrame, RotatedFrame, hadamard, random_signs
from qaq_core.pages import KEY, VALUE
from tests.core.rows import HEAD_DIMS, normal, rotated_frame


def rope(vector: torch.Tensor, frequencies: torch.Tensor, position: int) -> torch.Tensor:
    """Rotary embedding of one vector [d], pair by pair."""
    out = vector.clone().double()
    half = len(vector) // 2
    for i, frequency in enumerate(frequencies.tolist()):
        cos, sin = torch.tensor(position * frequency).cos(), torch.tensor(position * frequency).sin()
        a, b = vector[i].double(), vector[i + half].double()
        out[i], out[i + half] = a * cos - b * sin, b * cos + a * sin
    return out


@given(dim=st.sampled_from((8, *HEAD_DIMS)), seed=st.integers(0, 1 << 30))
def test_hadamard_is_orthonormal_and_its_own_inverse(dim: int, seed: int) -> None:
    matrix = hadamard(torch.eye(dim))
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim), atol=1e-5)
    rows = normal(seed, 3, dim)
    assert torch.allclose(hadamard(hadamard(rows)), rows, atol=1e-5)


def test_hadamard_by_hand() -> None:
    assert hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [5, -1, -2, 0]  # halves of 10, -2, -4, 0


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_key_rows_are_the_formula(dim: int) -> None:
    frame = rotated_frame(2, 2, dim, kinds=2)
    keys = normal(0, 2, 2, 1, dim)
    for layer, head, position in ((0, 1, 0), (1, 0, 77), (1, 1, 3001)):
        index = [torch.tensor([i]) for i in (layer, head, position)]
        row = frame.rows(KEY, keys[layer, head], *index)
        mean = rope(frame.key_mean[layer, head], frame.frequencies[layer], position)
        expected = hadamard(((keys[layer, head, 0] - mean) * frame.signs).float())
        assert torch.allclose(row[0], expected, atol=2e-4)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_scores_and_outputs_are_restored(dim: int) -> None:
    layers, heads, group, n, start = 2, 2, 3, 9, 40
    frame = rotated_frame(layers, heads, dim, kinds=2)
    keys, values = normal(1, layers, heads, n, dim), normal(2, layers, heads, n, dim)
    index = (
        torch.arange(layers)[:, None, None],
        torch.arange(heads)[None, :, None],
        torch.arange(start, start + n)[None, None, :],
    )
    key_rows, value_rows = frame.rows(KEY, keys, *index), frame.rows(VALUE, values, *index)
    query = normal(3, heads * group, 4, dim)
    weights = torch.rand(heads * group, 4, n)
    for layer in range(layers):
        wide = [x[layer].repeat_interleave(group, 0) for x in (keys, values, key_rows, value_rows)]
        center = frame.center_scores(layer, query, start, start + n)
        assert center is not None
        scores = frame.query(layer, query) @ wide[2].transpose(1, 2) + center
        assert torch.allclose(scores, query @ wide[0].transpose(1, 2), atol=2e-3, rtol=1e-4)
        output = frame.restore(layer, weights @ wide[3], weights.sum(-1))
        assert torch.allclose(output, weights @ wide[1], atol=1e-3, rtol=1e-4)


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), side=st.sampled_from((KEY, VALUE)))
def test_a_row_is_the_same_bits_alone_and_in_a_batch(seed: int, dim: int, side: int) -> None:
    """The worker makes rows of whole blocks, the cache service of scattered ones."""
    layers, heads, n, start = 3, 2, 7, 11
    frame = rotated_frame(layers, heads, dim, kinds=2)
    originals = normal(seed, layers, heads, n, dim) * 5
    block = frame.rows(
        side,
        originals,
        torch.arange(layers)[:, None, None],
        torch.arange(heads)[None, :, None],
        torch.arange(start, start + n)[None, None, :],
    )
    pick = torch.randperm(layers * heads * n, generator=torch.Generator().manual_seed(seed))[:10]
    layer, head, token = torch.unravel_index(pick, (layers, heads, n))
    elsewhere = RotatedFrame(**frame.tensors())
    alone = elsewhere.rows(side, originals[layer, head, token], layer, head, token + start)
    assert torch.equal(alone, block[layer, head, token])


def test_the_plain_frame_changes_nothing() -> None:
    frame, rows = PlainFrame(), normal(0, 2, 3, 16)
    nothing = torch.zeros((), dtype=torch.long)
    assert torch.equal(frame.rows(KEY, rows.half(), nothing, nothing, nothing), rows.half().float())
    assert frame.query(0, rows) is rows
    assert frame.center_scores(0, rows, 0, 5) is None
    assert frame.restore(0, rows, rows[..., 0]) is rows


def test_signs_are_the_same_everywhere() -> None:
    assert torch.equal(random_signs(64), random_signs(64))
    assert set(random_signs(64).tolist()) == {-1.0, 1.0}
