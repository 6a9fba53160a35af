"""Bit policies: the paper's formulas by hand, the balanced rule by brute force, and the price."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.allocation.policies import BalancedPolicy, FixedPolicy, PaperPolicy, View
from qaq_core.allocation.policies.balanced import CODED, FLOOR, token_weights, trailing_mean
from qaq_core.allocation.policies.base import solve_error, solve_lambda
from qaq_core.allocation.policies.paper import bits_for, key_deviation, value_deviation
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.quantization.codecs import GaussianCodec, NormalCodec, ProgressiveCodec, UniformCodec
from qaq_core.quantization.codecs.progressive import greedy_order
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform
from tests.core.rows import GRANULARITIES

LAYERS, HEADS, LENGTH, FIRST, N = 2, 2, 10, 4, 4


def view(seed: int, length: int = LENGTH, first: int = FIRST, n: int = N, parts: int = 1) -> View:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, HEADS, n, parts)
    return View(
        torch.rand(LAYERS, HEADS, length, generator=generator) ** 8,
        first,
        (torch.rand(shape, generator=generator) * 4 + 0.1, torch.rand(shape, generator=generator) * 4 + 0.1),
    )


# -- the paper, with numbers worked out on paper -------------------------------------------------------------


def test_a_values_deviation_by_hand() -> None:
    # T = 100 tokens, sigma_X = 0.02, S_t = 0.1: sigma_V = 0.02 / (sqrt(100) * 0.1) = 0.02 / 1 = 0.02.
    assert float(value_deviation(100, 0.02, torch.tensor(0.1))) == pytest.approx(0.02)
    # S_t = 0.004: sigma_V = 0.02 / (10 * 0.004) = 0.5.
    assert float(value_deviation(100, 0.02, torch.tensor(0.004))) == pytest.approx(0.5)


def test_a_keys_deviation_by_hand() -> None:
    # T = 11, sigma_S = 0.1, |q|^2 = 4: T^3/(T-1) = 1331/10 = 133.1; * sigma_S^2 = 1.331;
    # ln(1.331 + 1) = 0.846297; / 4 = 0.211574; the root of it is 0.459972.
    assert float(key_deviation(11, 0.1, torch.tensor(4.0))) == pytest.approx(0.459972, rel=1e-5)
    # T = 100, sigma_S = 0.002, |q|^2 = 25: 10^6/99 * 4e-6 = 0.0404040; ln(1.0404040) = 0.0396091;
    # / 25 = 0.00158437; the root is 0.0398041.
    assert float(key_deviation(100, 0.002, torch.tensor(25.0))) == pytest.approx(0.0398041, rel=1e-5)


def test_bits_by_hand() -> None:
    # 2*sqrt(3) = 3.464102. Range 4 at sigma 0.02: 4 / 0.0692820 = 57.735; log2 = 5.851; 6 bits.
    # Range 4 at sigma 0.5: 4 / 1.7320508 = 2.3094; log2 = 1.2075; 2 bits.
    # Range 1 at sigma 0.5: 0.57735; log2 = -0.79; 0 bits (before clipping: the ceiling of -0.79).
    got = bits_for(torch.tensor([4.0, 4.0, 1.0]), torch.tensor([0.02, 0.5, 0.5]))
    assert got.tolist() == [6, 2, 0]


def by_hand_view() -> View:
    """T = 100. Two tokens with S_t 0.1 and 0.004; key ranges 3 and 0.1, value ranges 4 and 4."""
    importance = torch.zeros(1, 1, 100)
    importance[0, 0, 50], importance[0, 0, 51] = 0.1, 0.004
    return View(importance, 50, (torch.tensor([[[[3.0], [0.1]]]]), torch.tensor([[[[4.0], [4.0]]]])))


def test_key_and_value_bits_by_hand() -> None:
    policy = PaperPolicy(torch.tensor([[25.0]]), UniformCodec("head").dims, sigma_x=0.02, sigma_s=0.002)
    keys, values = policy.widths(policy.demand(by_hand_view()), 1.0)
    # Keys: sigma_K = 0.0398041 for both; 3 / (3.464102 * 0.0398041) = 21.757, log2 = 4.44: 5 bits;
    # 0.1 / 0.137886 = 0.725, log2 = -0.46: 0 bits, clipped to the minimum of 1.
    assert (keys.flatten() / 2).tolist() == [5, 1]
    # Values: as above, sigma_V = 0.02 and 0.5: 6 and 2 bits.
    assert (values.flatten() / 2).tolist() == [6, 2]


def test_bits_are_clipped_at_both_ends() -> None:
    policy = PaperPolicy(torch.tensor([[25.0]]), UniformCodec("head").dims, bits=(3, 5))
    keys, values = policy.widths(policy.demand(by_hand_view()), 1.0)
    assert (keys.flatten() / 2).tolist() == [5, 3]
    assert (values.flatten() / 2).tolist() == [5, 3]


def test_the_normal_codecs_range_is_six_deviations() -> None:
    policy = PaperPolicy(torch.tensor([[25.0]]), NormalCodec("head").dims, normal=True)
    _, values = policy.widths(policy.demand(by_hand_view()), 1.0)
    # Range 6 * 4 = 24: 24 / 0.069282 = 346.4, log2 = 8.44: 9 bits, clipped to 8;
    # 24 / 1.7320508 = 13.86, log2 = 3.79: 4 bits.
    assert (values.flatten() / 2).tolist() == [8, 4]


def test_the_price_multiplies_both_tolerated_errors() -> None:
    cheap = PaperPolicy(torch.tensor([[25.0]]), (-1,), sigma_x=0.02, sigma_s=0.002)
    dear = PaperPolicy(torch.tensor([[25.0]]), (-1,), sigma_x=0.08, sigma_s=0.008)
    priced = cheap.widths(cheap.demand(by_hand_view()), 4.0)
    expected = dear.widths(dear.demand(by_hand_view()), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(priced, expected, strict=True))


@given(seed=st.integers(0, 1 << 30))
@pytest.mark.parametrize("group", GRANULARITIES)
def test_a_group_shares_its_bits_and_its_members_largest_need(group: str, seed: int) -> None:
    norms = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(seed)) * 100 + 1
    full = view(seed)
    lead = {"head": (LAYERS, HEADS), "layer": (LAYERS, 1), "token": (1, 1)}[group]
    scales = tuple(scale[: lead[0], : lead[1]] for scale in full.scales)
    policy = PaperPolicy(norms, UniformCodec(group).dims)
    seen = View(full.importance, FIRST, (scales[0], scales[1]))
    keys, values = policy.widths(policy.demand(seen), 1.0)
    assert keys.shape == values.shape == (LAYERS, HEADS, N)
    for layer in range(LAYERS):
        for head in range(HEADS):
            members = [
                (a, h)
                for a in range(LAYERS)
                for h in range(HEADS)
                if (group == "token" or a == layer) and (group != "head" or h == head)
            ]
            place = (layer if lead[0] > 1 else 0, head if lead[1] > 1 else 0)
            for token in range(N):
                attention = max(float(full.importance[a, h, FIRST + token]) for a, h in members)
                norm = max(float(norms[m]) for m in members)
                sigma_v = 0.02 / (math.sqrt(LENGTH) * max(attention, 1e-12))
                sigma_k = math.sqrt(math.log(LENGTH**3 / (LENGTH - 1) * 0.002**2 + 1) / norm)
                for got, side, sigma in ((keys, 0, sigma_k), (values, 1, sigma_v)):
                    exact = math.log2(float(scales[side][(*place, token)]) / (2 * math.sqrt(3) * sigma))
                    if abs(exact - round(exact)) > 1e-4:
                        assert int(got[layer, head, token]) == 2 * min(8, max(1, math.ceil(exact)))


def test_one_token_has_bits_too() -> None:
    policy = PaperPolicy(torch.ones(1, 1), (-1,))
    seen = View(torch.ones(1, 1, 1), 0, (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)))
    keys, values = policy.widths(policy.demand(seen), 1.0)
    assert 2 <= int(keys) <= 16
    assert 2 <= int(values) <= 16


# -- balanced ------------------------------------------------------------------------------------------------

OCTETS = 8


class Balanced:
    """A policy beside the cost of every width, octet by octet."""

    def __init__(self, seed: int, fall: float, alike: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        heads = torch.rand(2, LAYERS, HEADS, 1, generator=generator) + 0.1
        several = (2, 1, 1, OCTETS) if alike else (2, LAYERS, HEADS, OCTETS)
        uneven = torch.rand(several, generator=generator) + 0.5
        self.costs = heads * uneven * 2.0 ** (-torch.arange(OCTETS) * fall)
        self.codec = ProgressiveCodec([greedy_order(side) for side in self.costs])
        quantizer = Quantizer(IdentityTransform(), self.codec)
        self.policy = BalancedPolicy(quantizer, (self.costs[KEY], self.costs[VALUE]))

    def losses(self, seen: View, side: int) -> torch.Tensor:
        """float64 [widths, layers, kv_heads, n]: w · mean_o c_o · D(b_o) · scale²."""
        weights = token_weights(seen.importance)[:, :, seen.first : seen.first + seen.shape[2]].double()
        scales = seen.scales[side].double() ** 2
        out = []
        for width in CODED:
            units = self.codec.order(side, 8 * OCTETS)[: width * OCTETS // 2].tolist()
            lost = torch.zeros_like(weights)
            for octet in range(OCTETS):
                scale = scales[..., 0 if octet < self.codec.split else 1]
                distortion = self.codec.distortion(units.count(octet))
                lost += self.costs[side, :, :, octet, None].double() * distortion * scale / OCTETS
            out.append(weights * lost)
        return torch.stack(out)


COSTS = {"seed": st.integers(0, 1 << 30), "fall": st.sampled_from((0.0, 0.3, 1.0))}


@given(**COSTS, lam=st.floats(1e-4, 1.0), need=st.sampled_from((0.5, 1.0, 2.0)))
def test_balanced_is_nearly_the_cheapest_width(seed: int, fall: float, lam: float, need: float) -> None:
    """Where gains per bit fall from step to step it is the cheapest of all widths, by brute force.

    Where they do not (the order is that of the mean head, and scales move parts against each other), the last step
    that pays is taken: it is dearer than the cheapest by at most what the steps on the way that do not pay lack.
    """
    subject, seen = Balanced(seed, fall), view(seed, parts=2)
    got = subject.policy.widths(subject.policy.demand(seen), lam, need=need)
    bits = torch.tensor(CODED, dtype=torch.float64)[:, None, None, None] / 2
    for side in (KEY, VALUE):
        costs = subject.losses(seen, side) * need + lam * bits
        place = torch.tensor([CODED.index(w) for w in got[side].flatten()]).view(1, *got[side].shape)
        chosen, cheapest = costs.gather(0, place)[0], costs.amin(0)
        unpaid = costs.diff(dim=0).clamp_min(0)  # of steps that cost more than they gain
        taken = torch.arange(len(CODED) - 1)[:, None, None, None] < place
        assert bool((chosen <= cheapest + (unpaid * taken).sum(0) + 1e-6 * cheapest).all())
        convex = (unpaid * taken).sum(0) <= 1e-9 * cheapest
        assert torch.allclose(chosen[convex], cheapest[convex], rtol=1e-5)
        assert float(convex.double().mean()) > 0.5
        # No step from there pays, and the last one taken did.
        steps = -subject.losses(seen, side).diff(dim=0) * need - lam * bits.diff(dim=0)
        after = torch.arange(len(CODED) - 1)[:, None, None, None] >= place
        assert bool((steps[after.expand_as(steps)] <= 1e-6 * lam).all())
        last = steps.gather(0, (place - 1).clamp_min(0))[0]
        assert bool(((last > -1e-6 * lam) | (place[0] == 0)).all())


@given(seed=st.integers(0, 1 << 30), fall=st.sampled_from((0.0, 0.3, 1.0)), lam=st.floats(1e-4, 1.0))
def test_balanced_is_the_cheapest_width_where_the_order_is_the_heads_own(seed: int, fall: float, lam: float) -> None:
    """A greedy order of a convex distortion has gains that fall, so climbing finds the minimum."""
    subject, seen = Balanced(seed, fall, alike=True), view(seed)
    seen = View(seen.importance, seen.first, (seen.scales[0].expand(-1, -1, -1, 2),) * 2)
    got = subject.policy.widths(subject.policy.demand(seen), lam)
    bits = torch.tensor(CODED, dtype=torch.float64)[:, None, None, None] / 2
    for side in (KEY, VALUE):
        costs = subject.losses(seen, side) + lam * bits
        place = torch.tensor([CODED.index(w) for w in got[side].flatten()]).view(1, *got[side].shape)
        assert torch.allclose(costs.gather(0, place)[0], costs.amin(0), rtol=1e-5)


@given(**COSTS)
def test_the_predicted_error_is_the_direct_sum(seed: int, fall: float) -> None:
    subject, seen = Balanced(seed, fall), view(seed, parts=2)
    every = torch.tensor(CODED, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(0, len(CODED), (2, *seen.shape), generator=generator)
    expected = sum(
        float(subject.losses(seen, side).gather(0, place[side].unsqueeze(0)).sum()) / 2 for side in (KEY, VALUE)
    )
    got = subject.policy.error(subject.policy.demand(seen), (every[place[KEY]], every[place[VALUE]]))
    assert got == pytest.approx(expected, rel=1e-4)


def test_need_only_ever_adds_bits() -> None:
    policy = Balanced(0, 0.3).policy
    demand = policy.demand(view(0, parts=2))
    for lam in (1e-4, 1e-2, 1.0):
        low, mid, high = (policy.widths(demand, lam, need=need) for need in (0.5, 1.0, 2.0))
        for a, b, c in zip(low, mid, high, strict=True):
            assert bool((a <= b).all())
            assert bool((b <= c).all())


@given(seed=st.integers(0, 1 << 30), length=st.integers(1, 80), reach=st.integers(0, 20))
def test_trailing_mean_is_the_mean_of_those_before(seed: int, length: int, reach: int) -> None:
    values = torch.rand(2, length, generator=torch.Generator().manual_seed(seed))
    got = trailing_mean(values, reach)
    for i in range(length):
        assert torch.allclose(got[:, i], values[:, max(0, i - reach) : i + 1].mean(-1), atol=1e-6)


def test_weights_have_a_floor_and_follow_attention() -> None:
    importance = torch.full((1, 1, 400), 1e-9)
    importance[0, 0, 200] = 0.5
    weights = token_weights(importance)[0, 0]
    assert float(weights.min()) >= 0.99 * FLOOR
    assert int(weights.argmax()) == 200
    assert float(weights[220]) > 5 * float(weights[100])  # what is read is read on
    assert float(weights[199]) == float(weights[100])


@pytest.mark.parametrize("target", [1.0, 2.2, 4.0])
@pytest.mark.parametrize("fall", [0.0, 0.5])
def test_the_price_meets_the_target(target: float, fall: float) -> None:
    policy = Balanced(1, fall).policy
    demand = policy.demand(view(1, length=2000, first=4, n=1900, parts=2))
    keys, values = policy.widths(demand, solve_lambda(policy, demand, target))
    assert float(keys.float().mean() + values.float().mean()) / 4 == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("tolerated", [1.0, 10.0])
def test_the_price_meets_the_tolerated_error(tolerated: float) -> None:
    policy = Balanced(1, 0.3).policy
    demand = policy.demand(view(1, length=2000, first=4, n=1900, parts=2))
    lam = solve_error(policy, demand, tolerated)
    assert policy.error(demand, policy.widths(demand, lam)) == pytest.approx(tolerated, rel=0.02)


def test_codecs_with_one_scale_a_row_are_the_same_sum() -> None:
    costs = torch.rand(LAYERS, HEADS, OCTETS)
    policy = BalancedPolicy(Quantizer(IdentityTransform(), GaussianCodec()), (costs, costs))
    seen = view(3)
    keys, values = policy.widths(policy.demand(seen), 0.01)
    lost = 0.0
    weights = token_weights(seen.importance)[:, :, FIRST : FIRST + N]
    for side, width in enumerate((keys, values)):
        for place in torch.cartesian_prod(*map(torch.arange, width.shape)):
            at = tuple(place.tolist())
            units = [u % OCTETS for u in range(int(width[at]) * OCTETS // 2)]
            errors = [float(costs[at[:2]][o]) * GaussianCodec().distortion(units.count(o)) for o in range(OCTETS)]
            lost += float(weights[at]) * sum(errors) / OCTETS * float(seen.scales[side][at]) ** 2 / 2
    assert policy.error(policy.demand(seen), (keys, values)) == pytest.approx(lost, rel=1e-4)


# -- fixed ---------------------------------------------------------------------------------------------------


def test_fixed_widths_are_fixed() -> None:
    policy = FixedPolicy(4, 2)
    keys, values = policy.widths(policy.demand(view(0)), 1.0)
    assert (keys.unique().tolist(), values.unique().tolist()) == ([8], [4])
    assert keys.shape == values.shape == (LAYERS, HEADS, N)


@pytest.mark.parametrize("pair", [(0, 4), (9, 4), (4, 12), (-1, 2), (4.5, 2), (2.25, 2)])
def test_widths_that_do_not_exist_are_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="bits are not among"):
        FixedPolicy(*pair)
