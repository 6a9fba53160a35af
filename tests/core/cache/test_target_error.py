"""A tolerated error as a target: what is predicted, and that sequences keep to it."""

from __future__ import annotations

import functools

import pytest
import torch

from qaq_core.allocation.policies import ErrorPolicy, View
from qaq_core.allocation.policies.balanced import token_weights
from qaq_core.allocation.policies.base import solve_error
from qaq_core.base.errors import ConfigError
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.method import Method
from qaq_core.cache.presets import make_method
from qaq_eval import baselines  # noqa: F401  (registers them as presets)
from tests.core.tiny_models import calibration, tiny, token_ids

KIND = "llama-gqa"


model = functools.cache(tiny)


@functools.cache
def method(error: float | None = None) -> Method:
    return make_method(model(KIND), preset="balanced", calibration=calibration(KIND), target_error=error)


def view(n: int, length: int) -> View:
    generator = torch.Generator().manual_seed(n)
    shape = method().shape
    parts = 2 if method().quantizer.codec.split else 1
    importance = torch.rand(shape.layers, shape.kv_heads, length, generator=generator) ** 8
    scales = [torch.rand(shape.layers, shape.kv_heads, n, parts, generator=generator) + 0.1 for _ in range(2)]
    return View(importance, 4, (scales[0], scales[1]))


def test_the_error_of_dropping_everything_by_hand() -> None:
    policy, seen, known = method().policy, view(6, 12), calibration(KIND)
    assert isinstance(policy, ErrorPolicy)
    split = method().quantizer.codec.split
    weight = token_weights(seen.importance)[:, :, 4:10]
    expected = 0.0
    for costs, scale in zip((known.key_costs, known.value_costs), seen.scales, strict=True):
        part = [0 if split == 0 or octet < split else 1 for octet in range(costs.shape[-1])]
        lost = costs.unsqueeze(2) * scale.square()[..., part]  # [layers, kv_heads, tokens, octets]
        expected += float((weight * lost.mean(-1)).sum()) * method().quantizer.codec.distortion(0) / 2
    nothing = torch.zeros(seen.shape, dtype=torch.uint8)
    assert policy.error(policy.demand(seen), (nothing, nothing)) == pytest.approx(expected, rel=1e-4)


def test_the_price_of_a_tolerated_error() -> None:
    policy, seen = method().policy, view(380, 400)
    assert isinstance(policy, ErrorPolicy)
    demand = policy.demand(seen)
    least = policy.error(demand, policy.widths(demand, 2.0**-60))
    assert least > 0
    for times in (2.0, 10.0, 100.0):
        lam = solve_error(policy, demand, least * times)
        assert 0.9 * least * times < policy.error(demand, policy.widths(demand, lam)) <= least * times
    # What no bits can meet gets all there are.
    keys, values = policy.widths(demand, solve_error(policy, demand, least / 2))
    assert len(keys.unique()) == len(values.unique()) == 1
    assert torch.equal(keys, policy.widths(demand, 2.0**-60)[0])


def test_a_sequence_holds_what_its_error_needs() -> None:
    ids = token_ids(260)

    def bits(error: float) -> float:
        cache = QAQCache([], method(error))
        with torch.no_grad():
            model(KIND)(ids, past_key_values=cache)
        stats = cache.stats()[0]
        held = [sum(width * n for width, n in h.items()) / sum(h.values()) for h in (stats.key_bits, stats.value_bits)]
        return sum(held) / 2

    least, middle, most = bits(0.1), bits(0.01), bits(0.001)
    assert least < middle - 0.5
    assert middle < most - 0.5


@pytest.mark.parametrize("error", [0.0, -1.0, 11.0, float("nan")])
def test_what_is_no_error_is_refused(error: float) -> None:
    with pytest.raises(ConfigError, match="target_error must be over 0"):
        method(error)


@pytest.mark.parametrize("preset", ["paper", "uniform-3"])
def test_who_does_not_predict_errors_takes_none(preset: str) -> None:
    with pytest.raises(ConfigError, match=r"does not predict its error|takes no target"):
        make_method(
            tiny(KIND),
            preset=preset,
            target_error=0.1,
            **({"calibration": calibration(KIND)} if preset == "paper" else {}),
        )
