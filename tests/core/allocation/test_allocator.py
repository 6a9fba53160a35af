"""Both allocators: the C++ one against the policy itself, and who moves against widths looked at one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.allocation.allocator import Allocator, TokenState
from qaq_core.allocation.attention_statistics import AttentionWindow, DecayingMeanSquare
from qaq_core.allocation.policies import BalancedPolicy
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import WIDTHS
from qaq_core.cache.backends import make_allocator
from qaq_core.kernels import NativeAllocator, load_library
from qaq_core.quantization.bit_planes import tags_of, widths_of
from qaq_core.quantization.codecs import ProgressiveCodec, UniformCodec
from qaq_core.quantization.codecs.progressive import greedy_order
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform

LAYERS, HEADS, OCTETS = 2, 3, 8
CPU = torch.device("cpu")
built = pytest.mark.skipif(load_library() is None, reason="the C++ library is not built")


class Subject:
    """A balanced method's parts, and tokens with any bytes."""

    def __init__(self, seed: int, length: int, first: int, count: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        costs = torch.rand(2, LAYERS, HEADS, OCTETS, generator=self.generator) * 2.0 ** -torch.arange(OCTETS)
        self.codec = ProgressiveCodec([greedy_order(side) for side in costs])
        quantizer = Quantizer(IdentityTransform(), self.codec)
        self.policy = BalancedPolicy(quantizer, (costs[KEY], costs[VALUE]))
        room = self.bytes(LAYERS, HEADS, length + 5, 1)  # a window's buffer is larger than what it holds
        metas = (self.bytes(LAYERS, HEADS, count, 1), self.bytes(LAYERS, HEADS, count, 1))
        self.kept = TokenState(room[:, :, :length], first, metas)
        held = torch.tensor(WIDTHS, dtype=torch.uint8)[self.bytes(2, LAYERS, HEADS, count).long() % len(WIDTHS)]
        self.tags = tags_of(held[KEY], held[VALUE])

    def bytes(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)

    def allocator(self, kernel: str) -> Allocator:
        return make_allocator(self.policy, self.codec, DecayingMeanSquare(), CPU, kernel)


SIZES = {"seed": st.integers(0, 1 << 30), "length": st.integers(40, 120), "first": st.integers(0, 8)}


@built
@given(**SIZES, log_price=st.floats(-30.0, 10.0))
def test_widths_in_cpp_are_the_policys(seed: int, length: int, first: int, log_price: float) -> None:
    subject = Subject(seed, length, first, length - first - 9)
    fast, plain = subject.allocator("cpu"), subject.allocator("reference")
    assert type(fast) is NativeAllocator
    assert type(plain) is Allocator
    fast_demand, demand = fast.demand(subject.kept), plain.demand(subject.kept)
    assert torch.equal(fast_demand.weight, demand.weight)
    for need in (0.5, 1.0, 2.0):
        got = fast.widths(fast_demand, 2.0**log_price, need=need)
        expected = plain.widths(demand, 2.0**log_price, need=need)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kernel", ["reference", pytest.param("cpu", marks=built)])
@given(
    **SIZES,
    log_price=st.floats(-20.0, 5.0),
    most=st.sampled_from((None, 1.0, 2.0)),
    least=st.sampled_from((None, 1.0, 0.5)),
)
def test_who_moves(
    kernel: str, seed: int, length: int, first: int, log_price: float, most: float | None, least: float | None
) -> None:
    subject = Subject(seed, length, first, length - first - 9)
    allocator, lam = subject.allocator(kernel), 2.0**log_price
    demand = allocator.demand(subject.kept)
    got = allocator.width_changes(demand, subject.tags, lam, most, least)
    want = allocator.widths(demand, lam)
    high, low = (allocator.widths(demand, lam, need=need or 1.0) for need in (most, least))
    for side, mine in zip((KEY, VALUE), got, strict=True):
        held = widths_of(subject.tags, side).flatten().tolist()
        moved = [
            place
            for place, width in enumerate(held)
            if (most is not None and width > int(high[side].flatten()[place]))
            or (least is not None and width < int(low[side].flatten()[place]))
        ]
        assert mine.index.tolist() == moved
        assert mine.held.tolist() == [held[place] for place in moved]
        assert mine.want.tolist() == want[side].flatten()[moved].tolist()
        assert len(mine.falling) + len(mine.rising) == len(mine)
        assert bool((mine.falling.want < mine.falling.held).all())
        assert bool((mine.rising.want > mine.rising.held).all())


@built
@given(**SIZES)
def test_what_is_seen_is_folded_in_alike(seed: int, length: int, first: int) -> None:
    subject = Subject(seed, length, first, 4)
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(LAYERS, HEADS, length, generator=generator) ** 40
    seen[torch.rand(seen.shape, generator=generator) < 0.1] = 0.0
    got, expected = subject.bytes(2, LAYERS, HEADS, length + 3, 1).unbind()
    got.copy_(expected)
    for position in (7, 1 << 20):
        subject.allocator("cpu").update_statistic(got, seen, position)
        subject.allocator("reference").update_statistic(expected, seen, position)
        # A number that lies on its threshold may be rounded either way.
        differ = (got.int() - expected.int()).abs()
        assert int(differ.max()) <= 1
        assert float(differ.float().mean()) < 1e-2
        assert torch.equal(got[:, :, length:], expected[:, :, length:])
        got.copy_(expected)


def test_tokens_that_stand_before_others() -> None:
    subject = Subject(0, 60, 20, 30)
    metas = (subject.bytes(LAYERS, HEADS, 16, 1), subject.bytes(LAYERS, HEADS, 16, 1))
    everything = subject.kept.preceded(4, metas)
    assert (everything.first, everything.shape) == (4, (LAYERS, HEADS, 46))
    allocator = subject.allocator("auto")
    own, all_of = (allocator.widths(allocator.demand(kept), 1e-3) for kept in (subject.kept, everything))
    assert all(torch.equal(a, b[:, :, 16:]) for a, b in zip(own, all_of, strict=True))


@pytest.mark.parametrize("codec", [UniformCodec("head"), None])
def test_what_is_not_one_byte_each_is_the_policys_alone(codec: UniformCodec | None) -> None:
    subject = Subject(0, 40, 4, 20)
    statistic = AttentionWindow() if codec is None else DecayingMeanSquare()
    assert type(make_allocator(subject.policy, codec or subject.codec, statistic, CPU)) is Allocator
