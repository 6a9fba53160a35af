"""Allocation: what a policy makes of the bytes that a sequence keeps of its tokens.

`Allocator` turns the bytes into numbers and asks the policy, which defines what is done. On a CPU `balanced` is
asked in C++ (native/balance.py), which reads the bytes as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qaq_core.allocation.attention_statistics import AttentionStatistic
from qaq_core.allocation.policies import Policy, View
from qaq_core.base.pages import KEY, VALUE
from qaq_core.quantization.bit_planes import widths_of
from qaq_core.quantization.codecs import Codec


@dataclass(frozen=True)
class TokenState:
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

    def preceded(self, first: int, metas: tuple[torch.Tensor, torch.Tensor]) -> TokenState:
        """The same tokens with those of the meta bytes, from position `first`, before them."""
        keys, values = (torch.cat([old, new], 2) for old, new in zip(metas, self.metas, strict=True))
        return TokenState(self.state, first, (keys, values))


@dataclass(frozen=True)
class WidthChanges:
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
    def falling(self) -> WidthChanges:
        return self.where(self.want < self.held)

    @property
    def rising(self) -> WidthChanges:
        return self.where(self.want > self.held)

    def where(self, mask: torch.Tensor) -> WidthChanges:
        """Those of a bool [n]."""
        return self if mask.all() else WidthChanges(self.index[mask], self.held[mask], self.want[mask])


class Allocator:
    """The bytes as numbers, and the policy's answers. For every policy, on any device."""

    def __init__(self, policy: Policy, codec: Codec, statistic: AttentionStatistic) -> None:
        self.policy, self.statistic, self._codec = policy, statistic, codec

    def view(self, kept: TokenState) -> View:
        """What a policy looks at."""
        keys, values = (self._codec.affine(meta)[0] for meta in kept.metas)
        return View(self.statistic.importance(kept.state), kept.first, (keys, values))

    def update_statistic(self, state: torch.Tensor, reduction: torch.Tensor, position: int) -> None:
        """See `AttentionStatistic.update`."""
        self.statistic.update(state, reduction, position)

    def demand(self, kept: TokenState) -> Any:
        """What does not depend on the price."""
        return self.policy.demand(self.view(kept))

    def widths(self, demand: Any, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Policy.widths`."""
        return self.policy.widths(demand, lam, need=need)

    def width_changes(
        self, demand: Any, tags: torch.Tensor, lam: float, most: float | None, least: float | None
    ) -> tuple[WidthChanges, WidthChanges]:
        """Keys and values that hold more than they could need, or less than they need at the least.

        Args:
            tags: uint8 [layers, kv_heads, n] of the demand's tokens, see `packing`.
            most: what a vector could need is what it wants with its importance so many times larger; None: do not
                look for those that hold more.
            least: the same for those that hold less.
        """
        want = self.widths(demand, lam)
        high, low = (want if need in (None, 1.0) else self.widths(demand, lam, need=need) for need in (most, least))
        sides = []
        for side in (KEY, VALUE):
            held = widths_of(tags, side)
            moved = torch.zeros_like(held, dtype=torch.bool)
            if most is not None:
                moved |= high[side] < held
            if least is not None:
                moved |= low[side] > held
            index = torch.nonzero(moved.reshape(-1)).squeeze(1)
            sides.append(WidthChanges(index, held.reshape(-1)[index], want[side].reshape(-1)[index]))
        return sides[KEY], sides[VALUE]
