"""OSCAR: its rotation, its clipping and its levels are those of its description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_core.cache.presets import make_method
from qaq_core.calibration import measurement
from qaq_core.models import ModelShape
from qaq_eval.baselines import oscar
from qaq_eval.baselines.oscar import FullRangeCodec, OscarMethod, QueryCovariances, clipped, rotation, value_covariance
from tests.core.rows import normal
from tests.core.tiny_models import tiny, token_ids

KIND = "llama-gqa"


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measurement, "TOKENS", 24)


def test_a_rotation_by_hand() -> None:
    """Of a diagonal covariance U is the identity; columns of H stand in the order 3, 1, 2, 0: 3, 2, 1, 0 (falling
    eigenvalues) at the places 0, 2, 1, 3 (bits reversed)."""
    found = rotation(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    h = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    found = found * found[:, 3:].sign()  # eigenvectors have no sign; the last column is H's first, of ones
    torch.testing.assert_close(found.float(), h[:, [3, 1, 2, 0]])


def test_rotations_are_orthogonal_and_even_out_what_queries_see() -> None:
    factor = normal(1, 64, 64).double() * torch.logspace(-2, 2, 64)
    covariance = factor @ factor.mT
    found = rotation(covariance)
    torch.testing.assert_close(found.mT @ found, torch.eye(64, dtype=torch.float64))
    spread = (found.mT @ covariance @ found).diagonal()
    torch.testing.assert_close(spread, covariance.trace().expand(64) / 64)


def test_a_head_dim_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ConfigError, match="power of two, not 80"):
        rotation(torch.eye(80))


def test_the_covariance_of_values_by_hand() -> None:
    # Tokens' weights are kᵀ·E[q qᵀ]·k = 1 and 3, or ½ and 1½ with a mean of 1; the second head weighs alike.
    queries = torch.stack([torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2)]).double()
    keys = torch.eye(2).expand(2, 2, 2)
    values = torch.stack([2 * torch.eye(2), torch.eye(2)])
    first, second = torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2) / 2
    torch.testing.assert_close(value_covariance(queries, keys, values), ((first + second) / 2).double())


def test_clipping_by_hand() -> None:
    row = torch.arange(1.0, 65.0) * (-1.0) ** torch.arange(64)
    # 0.96 · 64 = 61.4: the 61st of magnitudes counted from 0 is 62. 0.92 · 64 = 58.9: 59.
    assert clipped(row, 0.96).abs().tolist() == [min(x, 62.0) for x in range(1, 65)]
    assert clipped(row, 0.92).abs().tolist() == [min(x, 59.0) for x in range(1, 65)]
    assert torch.equal(clipped(row, 1.0), row)
    assert torch.equal(clipped(row, 0.92).sign(), row.sign())


def test_levels_by_hand() -> None:
    codec = FullRangeCodec(2)
    row = torch.tensor([-1.0, 5.0, 1.0, 3.0, 0.1, 1.9, 2.1, 4.1] * 2).view(1, 1, 1, 16)
    scale, offset = codec.affine(codec.meta(row, None))
    assert offset is not None
    codes = codec.codes((row - offset.unsqueeze(-1)) / scale) >> 6
    assert codes[0, 0, 0, :8].tolist() == [0, 3, 1, 2, 1, 1, 2, 3]  # levels -1, 1, 3, 5
    got = offset.unsqueeze(-1) + scale * codec.levels(2)[codes.long()]
    assert got[0, 0, 0, :8].tolist() == pytest.approx([-1, 5, 1, 3, 1, 1, 3, 5], abs=2e-3)
    rows = normal(0, 2, 3, 20, 64)
    scale, offset = codec.affine(codec.meta(rows, None))
    codes = codec.codes((rows - offset.unsqueeze(-1)) / scale) >> 6  # type: ignore[union-attr]
    got = offset.unsqueeze(-1) + scale * codec.levels(2)[codes.long()]  # type: ignore[union-attr]
    sixth = (rows.amax(-1, True) - rows.amin(-1, True)) / 6
    assert bool(((got - rows).abs() <= sixth * 1.01 + 1e-2).all())


def test_queries_are_those_of_attention_after_the_first_four_tokens() -> None:
    model = tiny(KIND)
    shape, ids = ModelShape.of(model), token_ids(20)
    whole, stepwise = QueryCovariances(model, shape), QueryCovariances(model, shape)
    was = model.config._attn_implementation
    with torch.no_grad(), whole:
        model(ids)
    with torch.no_grad(), stepwise:
        past = None
        for first, last in ((0, 3), (3, 5), (5, 20)):
            past = model(ids[:, first:last], past_key_values=past, use_cache=True).past_key_values
    assert model.config._attn_implementation == was
    for layer in range(shape.layers):
        expected = whole.of_layer(layer)
        assert expected.shape == (2, 32, 32)
        torch.testing.assert_close(stepwise.of_layer(layer), expected, rtol=1e-4, atol=1e-5)
    # By hand in the first layer: q of 4 heads in 2 groups, at 16 positions. RoPE keeps norms, and so the trace.
    first = model.model.layers[0]
    states = first.input_layernorm(model.model.embed_tokens(ids[:, 4:]))
    queries = first.self_attn.q_proj(states).view(16, 2, 2, 32)
    trace = queries.square().sum((0, 2, 3)) / 32
    torch.testing.assert_close(
        whole.of_layer(0).diagonal(dim1=-2, dim2=-1).sum(-1).float(), trace, rtol=1e-4, atol=1e-4
    )


def test_rotations_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(KIND)
    made = make_method(model, "tiny", "oscar-2")
    assert isinstance(made, OscarMethod)
    assert made.clip == (0.96, 0.92)

    def sampling(*args: Any) -> Any:
        raise AssertionError("the text is sampled again")

    monkeypatch.setattr(oscar, "own_text", sampling)
    again = make_method(model, "tiny", "oscar-2", clip_keys=1.0)
    assert again.quantizer.id == made.quantizer.id
    keys, values = oscar.rotations(model, ModelShape.of(model))
    for side in (keys, values):
        assert side.shape == (3, 1, 32, 32)
        torch.testing.assert_close(side.mT @ side, torch.eye(32).expand(3, 1, 32, 32), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"), [({"clip_keys": 0}, "over 0 and at most 1"), ({"sink": 3}, "does not take these settings")]
)
def test_wrong_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(tiny(KIND), "tiny", "oscar-2", **settings)
