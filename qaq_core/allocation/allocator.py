"""The allocator: asks a policy for widths, given the bytes that a sequence stores about its tokens.

`Allocator` decodes the bytes and calls the policy, which defines the result. On a CPU the balanced policy runs in C++
(kernels/allocate.py), which reads the bytes directly.
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
    """The bytes stored about tokens that are packed, or about to be.

    Attributes:
        state: uint8 [layers, kv_heads, length, bytes], of the attention statistic, of all tokens by position.
        first: position of the first of the n tokens that get bits.
        metas: meta bytes of keys and values, uint8 [layers or 1, kv_heads or 1, n, bytes].
    """

    state: torch.Tensor
    first: int
    metas: tuple[torch.Tensor, torch.Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.state.shape[0], self.state.shape[1], self.metas[KEY].shape[2]

    def preceded(self, first: int, metas: tuple[torch.Tensor, torch.Tensor]) -> TokenState:
        """The same state with the tokens of these meta bytes, from position `first`, in front."""
        keys, values = (torch.cat([old, new], 2) for old, new in zip(metas, self.metas, strict=True))
        return TokenState(self.state, first, (keys, values))


@dataclass(frozen=True)
class WidthChanges:
    """n vectors of one side whose width should change.

    Attributes:
        index: int64 [n], ascending, flat in the tags [layers, kv_heads, tokens].
        held, want: uint8 [n], the width that they have and the one that they should have.
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
        """Those that a bool [n] selects."""
        return self if mask.all() else WidthChanges(self.index[mask], self.held[mask], self.want[mask])


class Allocator:
    """Widths by any policy, on any device."""

    def __init__(self, policy: Policy, codec: Codec, statistic: AttentionStatistic) -> None:
        self.policy, self.statistic, self._codec = policy, statistic, codec

    def view(self, state: TokenState) -> View:
        """The state as a policy sees it."""
        keys, values = (self._codec.affine(meta)[0] for meta in state.metas)
        return View(self.statistic.importance(state.state), state.first, (keys, values))

    def update_statistic(self, state: torch.Tensor, observed: torch.Tensor, position: int) -> None:
        """See `AttentionStatistic.update`."""
        self.statistic.update(state, observed, position)

    def demand(self, state: TokenState) -> Any:
        """What the policy needs for widths at any λ."""
        return self.policy.demand(self.view(state))

    def widths(self, demand: Any, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Policy.widths`."""
        return self.policy.widths(demand, lam, need=need)

    def width_changes(
        self, demand: Any, tags: torch.Tensor, lam: float, most: float | None, least: float | None
    ) -> tuple[WidthChanges, WidthChanges]:
        """Keys and values whose width is above the most that they could need, or below the least.

        Args:
            tags: uint8 [layers, kv_heads, n] of the demand's tokens, see `bit_planes`.
            most: factor on the importance for the most that a vector could need; None finds none that hold more.
            least: factor on the importance for the least that a vector needs; None finds none that hold less.
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
