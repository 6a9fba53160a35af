"""What quantization costs a step: against the policy's own error, and C++ against torch."""

from __future__ import annotations

import pytest
import torch

from qaq_core.allocation import DecayingMeanSquare, StepErrors, View
from qaq_core.allocation import step_error as step_errors
from qaq_core.allocation.policies import BalancedPolicy
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import WIDTHS
from qaq_core.cache.backends import make_step_errors
from qaq_core.kernels import NativeStepErrors, load_library
from qaq_core.quantization.codecs import ProgressiveCodec
from qaq_core.quantization.codecs.progressive import greedy_order
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform
from qaq_core.storage.packed import PackedTokens
from tests.core.rows import normal

LAYERS, HEADS, DIM, SINKS, TOKENS, LENGTH = 3, 2, 64, 4, 150, 170
CPU = torch.device("cpu")


@pytest.fixture
def parts() -> tuple[BalancedPolicy, ProgressiveCodec, PackedTokens, torch.Tensor]:
    """A policy, its codec, packed tokens of any widths below half precision, and p² of all tokens."""
    generator = torch.Generator().manual_seed(3)
    costs = torch.rand(2, LAYERS, HEADS, DIM // 8, generator=generator)
    codec = ProgressiveCodec([greedy_order(side) for side in costs])
    quantizer = Quantizer(IdentityTransform(), codec)
    packed = PackedTokens(quantizer, (LAYERS, HEADS, DIM), SINKS, CPU)
    rows = [normal(side, LAYERS, HEADS, TOKENS, DIM) * (1 + side) for side in (KEY, VALUE)]
    pick = torch.randint(0, len(WIDTHS) - 1, (2, LAYERS, HEADS, TOKENS), generator=generator)
    keys, values = torch.tensor(WIDTHS, dtype=torch.uint8)[pick]
    metas = tuple(quantizer.meta(row) for row in rows)
    packed.append((keys, values), tuple(rows), metas, (None, None))  # type: ignore[arg-type]
    observed = torch.rand(LAYERS, HEADS, LENGTH, generator=generator) ** 12
    return BalancedPolicy(quantizer, (costs[KEY], costs[VALUE])), codec, packed, observed


def test_the_error_is_the_policys_for_that_attention(
    parts: tuple[BalancedPolicy, ProgressiveCodec, PackedTokens, torch.Tensor],
) -> None:
    policy, codec, packed, observed = parts
    errors = StepErrors(policy, codec, DIM)
    factors = errors.factors(observed, SINKS)
    step = errors.step(packed, observed, factors)
    found = [step.look(layer, -1.0) for layer in range(LAYERS)]
    scales = tuple(codec.affine(meta)[0] for meta in packed.metas)
    demand = policy.demand(View(observed, SINKS, scales))  # type: ignore[arg-type]
    own = observed[:, :, SINKS : SINKS + TOKENS] / observed[:, :, SINKS:].sum(-1, keepdim=True)
    widths = packed.widths(KEY), packed.widths(VALUE)
    expected = DIM * policy.error(type(demand)(own, demand.scales, demand.tables), widths)
    assert step.total == pytest.approx(expected, rel=1e-4)
    assert sum(float(layer.error.sum()) for layer in found if layer) == pytest.approx(expected, rel=1e-4)
    assert float(errors.factors(torch.zeros_like(observed), SINKS).abs().max()) == 0.0


@pytest.mark.skipif(load_library() is None, reason="the C++ library is not built")
@pytest.mark.parametrize("most", [1024, 40])
def test_cpp_finds_what_torch_does(
    parts: tuple[BalancedPolicy, ProgressiveCodec, PackedTokens, torch.Tensor],
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_errors, "MOST_FOUND", most)
    monkeypatch.setattr("qaq_core.kernels.step_error.MOST_FOUND", most)
    policy, codec, packed, observed = parts
    importance = DecayingMeanSquare().importance(torch.full((LAYERS, HEADS, LENGTH, 1), 200, dtype=torch.uint8))
    made = [make_step_errors(policy, codec, DIM, CPU, kernel) for kernel in ("cpu", "reference")]
    assert [type(one) for one in made] == [NativeStepErrors, StepErrors]
    fast, plain = (one.step(packed, observed, one.factors(importance, SINKS)) for one in made)
    for layer in range(LAYERS):
        least = (0.0, 1e-3, 1e9)[layer]
        ours, theirs = fast.look(layer, least), plain.look(layer, least)
        assert (ours is None) == (theirs is None) == (layer == 2)
        if ours is not None and theirs is not None:
            assert len(ours) > 20
            assert torch.equal(ours.head, theirs.head)
            assert torch.equal(ours.token, theirs.token)
            assert torch.equal(ours.error, theirs.error)
            largest = ours.largest(7)
            assert sorted(largest.error.tolist()) == sorted(ours.error.sort(descending=True).values[:7].tolist())
    assert fast.total == pytest.approx(plain.total, rel=1e-9)
