"""Allocation: what a policy makes of the bytes that a sequence keeps of its tokens.

`Allocator` turns the bytes into numbers and asks the policy, which defines what is done. On a CPU `balanced` is
asked in C++ (native/balance.py), which reads the bytes as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core import native
from qaq_core.codecs import Codec
from qaq_core.native.balance import NativeBalance
from qaq_core.packing import widths_of
from qaq_core.pages import KEY, VALUE
from qaq_core.policies import BalancedPolicy, Policy, View
from qaq_core.window import DecayWindow, Window


@dataclass(frozen=True)
class Kept:
    """What is kept of tokens that hold bits, or are about to.

    Attributes:
        state: uint8 [layers, kv_heads, length, bytes], the window's, of all tokens by position.
        first: position of the first of the n tokens that get bits.
        metas: keys' and values' meta bytes, uint8 [layers or 1, kv_heads or 1, n, bytes].
    """

    state: torch.Tensor
    first: int
    metas: tuple[torch.Tensor, torch.Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.state.shape[0], self.state.shape[1], self.metas[KEY].shape[2]

    def preceded(self, first: int, metas: tuple[torch.Tensor, torch.Tensor]) -> Kept:
        """The same tokens with those of the meta bytes, from position `first`, before them."""
        keys, values = (torch.cat([old, new], 2) for old, new in zip(metas, self.metas, strict=True))
        return Kept(self.state, first, (keys, values))


@dataclass(frozen=True)
class Movers:
    """n vectors of one side that should change their width.

    Attributes:
        index: int64 [n], ascending, flat in the tags [layers, kv_heads, tokens].
        held, want: uint8 [n], the width they have, and the one they should have.
    """

    index: torch.Tensor
    held: torch.Tensor
    want: torch.Tensor

    def __len__(self) -> int:
        return len(self.index)

    @property
    def falling(self) -> Movers:
        return self.where(self.want < self.held)

    @property
    def rising(self) -> Movers:
        return self.where(self.want > self.held)

    def where(self, mask: torch.Tensor) -> Movers:
        """Those of a bool [n]."""
        return self if mask.all() else Movers(self.index[mask], self.held[mask], self.want[mask])


class Allocator:
    """The bytes as numbers, and the policy's answers. For every policy, on any device."""

    def __init__(self, policy: Policy, codec: Codec, window: Window) -> None:
        self.policy, self._codec, self._window = policy, codec, window

    def view(self, kept: Kept) -> View:
        """What a policy looks at."""
        keys, values = (self._codec.affine(meta)[0] for meta in kept.metas)
        return View(self._window.importance(kept.state), kept.first, (keys, values))

    def observe(self, state: torch.Tensor, statistic: torch.Tensor, position: int) -> None:
        """See `Window.observe`."""
        self._window.observe(state, statistic, position)

    def demand(self, kept: Kept) -> Any:
        """What does not depend on the price."""
        return self.policy.demand(self.view(kept))

    def widths(self, demand: Any, price: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Policy.widths`."""
        return self.policy.widths(demand, price, need=need)

    def movers(
        self, demand: Any, tags: torch.Tensor, price: float, most: float | None, least: float | None
    ) -> tuple[Movers, Movers]:
        """Keys and values that hold more than they could need, or less than they need at the least.

        Args:
            tags: uint8 [layers, kv_heads, n] of the demand's tokens, see `packing`.
            most: what a vector could need is what it wants with its importance so many times larger; None: do not
                look for those that hold more.
            least: the same for those that hold less.
        """
        want = self.widths(demand, price)
        high, low = (
            want if need in (None, 1.0) else self.widths(demand, price, need=need) for need in (most, least)
        )
        sides = []
        for side in (KEY, VALUE):
            held = widths_of(tags, side)
            moved = torch.zeros_like(held, dtype=torch.bool)
            if most is not None:
                moved |= high[side] < held
            if least is not None:
                moved |= low[side] > held
            index = torch.nonzero(moved.reshape(-1)).squeeze(1)
            sides.append(Movers(index, held.reshape(-1)[index], want[side].reshape(-1)[index]))
        return sides[KEY], sides[VALUE]


@dataclass(frozen=True)
class Weighed:
    """Tokens' weights float32 [layers, kv_heads, n], and their rows' meta bytes."""

    weight: torch.Tensor
    metas: tuple[torch.Tensor, torch.Tensor]


class BalancedAllocator(Allocator):
    """The balanced policy in C++, which looks a row's thresholds up by its meta byte."""

    def __init__(self, policy: BalancedPolicy, codec: Codec, window: Window, library: Any) -> None:
        super().__init__(policy, codec, window)
        every = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1)
        scales = codec.affine(every)[0]
        thresholds = [table.thresholds(scales).permute(1, 2, 3, 0).contiguous() for table in policy.tables]
        self._native = NativeBalance(library, window.importance(every).flatten(), thresholds)

    def observe(self, state: torch.Tensor, statistic: torch.Tensor, position: int) -> None:
        if isinstance(self._window, DecayWindow):
            self._native.fold(state, statistic, self._window.keep, position)
        else:
            super().observe(state, statistic, position)

    def demand(self, kept: Kept) -> Weighed:
        return Weighed(self._native.weigh(kept.state, kept.first, kept.shape[2]), kept.metas)

    def widths(self, demand: Weighed, price: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (self._native.widths(s, demand.weight, demand.metas[s], need / price) for s in (KEY, VALUE))
        return keys, values

    def movers(
        self, demand: Weighed, tags: torch.Tensor, price: float, most: float | None, least: float | None
    ) -> tuple[Movers, Movers]:
        factors = [math.nan if need is None else need / price for need in (most, 1.0, least)]
        keys, values = (
            Movers(*self._native.movers(side, demand.weight, demand.metas[side], tags, factors))
            for side in (KEY, VALUE)
        )
        return keys, values


def make(
    policy: Policy, codec: Codec, window: Window, device: torch.device, kernel: str | None = None
) -> Allocator:
    """The allocator to use on a device; see `native.find`."""
    library = native.find(device, kernel)
    bytewise = codec.meta_bytes == 1 and window.bytes_per_token == 1
    if library is not None and bytewise and isinstance(policy, BalancedPolicy):
        return BalancedAllocator(policy, codec, window, library)
    return Allocator(policy, codec, window)
