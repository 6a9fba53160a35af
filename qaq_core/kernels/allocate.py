"""The balanced policy on the CPU in C++ (csrc/allocate.h); `policies.BalancedPolicy` defines the results."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core.allocation.allocator import Allocator, TokenState, WidthChanges
from qaq_core.allocation.attention_statistics import (
    DITHER,
    LOG2_FLOOR,
    LOG2_STEP,
    AttentionStatistic,
    DecayingMeanSquare,
)
from qaq_core.allocation.policies.balanced import FLOOR, OWN, REACH, SINKS, BalancedPolicy
from qaq_core.base.pages import KEY, VALUE
from qaq_core.kernels.library import checked
from qaq_core.kernels.repack import head_stride
from qaq_core.kernels.structures import SideRows, StatisticUpdate, Weigh
from qaq_core.quantization.codecs import Codec


class _Rules:
    """The library's calls for one model: weights of tokens and widths of their rows.

    Args:
        importance: float32 [256], by a byte of the statistic's state.
        thresholds: of keys and values, float32 [layers, kv_heads, 256, steps], by meta byte; see
            `CostTable.thresholds`.
    """

    def __init__(self, library: Any, importance: torch.Tensor, thresholds: Sequence[torch.Tensor]) -> None:
        self._library, self._importance, self._thresholds = library, importance.contiguous(), thresholds
        library.qaq_width_changes.restype = c_int64

    def weigh(self, state: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Weights float32 [layers, kv_heads, count] of tokens from position `first`, see `token_weights`.

        Args:
            state: uint8 [layers, kv_heads, length, 1].
        """
        layers, heads, tokens, _ = state.shape
        weight = torch.empty(layers, heads, count)
        sums, smooth = torch.empty(tokens + 1, dtype=torch.float64), torch.empty(tokens)
        job = Weigh(
            heads=layers * heads,
            tokens=tokens,
            first=first,
            count=count,
            sinks=SINKS,
            reach=REACH,
            own=OWN,
            before=1 - OWN,
            share=1 - FLOOR,
            floor=FLOOR,
            state=state.data_ptr(),
            state_stride=head_stride(state[..., 0]),
            importance=self._importance.data_ptr(),
            sums=sums.data_ptr(),
            smooth=smooth.data_ptr(),
            weight=weight.data_ptr(),
        )
        checked(self._library.qaq_weigh, ctypes.byref(job))
        return weight

    def update_statistic(self, state: torch.Tensor, observed: torch.Tensor, keep: float, position: int) -> None:
        """Updates a state with the attention of the query at a position, see `DecayingMeanSquare`.

        Args:
            state: uint8 [layers, kv_heads, tokens or more, 1]. observed: float32 [layers, kv_heads, tokens].
            keep: weight of the state in the mean.
        """
        layers, heads, tokens = observed.shape
        job = StatisticUpdate(
            heads=layers * heads,
            tokens=tokens,
            state=state.data_ptr(),
            state_stride=head_stride(state[..., 0]),
            importance=self._importance.data_ptr(),
            observed=observed.data_ptr(),
            keep=keep,
            log2_floor=LOG2_FLOOR,
            step=LOG2_STEP,
            seed=DITHER * position,
        )
        checked(self._library.qaq_update_statistic, ctypes.byref(job))

    def widths(self, side: int, weight: torch.Tensor, meta: torch.Tensor, factor: float) -> torch.Tensor:
        """Widths uint8 [layers, kv_heads, n] of rows with meta bytes [layers, kv_heads, n, 1].

        Args:
            factor: rows get the width of their weight times this.
        """
        widths = torch.empty(weight.shape, dtype=torch.uint8)
        rows = self._rows(side, weight, meta)
        checked(self._library.qaq_widths, ctypes.byref(rows), c_float(factor), c_void_p(widths.data_ptr()))
        return widths

    def width_changes(
        self, side: int, weight: torch.Tensor, meta: torch.Tensor, tags: torch.Tensor, factors: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Index, width held and width wanted of rows that should change width, see `allocation.WidthChanges`.

        Args:
            factors: as in `widths`. Rows wider than the first one gives or narrower than the last one gives change to
                what the second one gives; a NaN finds none.
        """
        rows = self._rows(side, weight, meta)
        rows.tags, rows.tags_stride, rows.shift = tags.data_ptr(), head_stride(tags), 4 * side
        index = torch.empty(weight.numel(), dtype=torch.int64)
        held, wanted = torch.empty(2, weight.numel(), dtype=torch.uint8).unbind()
        out = (c_void_p(part.data_ptr()) for part in (index, held, wanted))
        count = checked(self._library.qaq_width_changes, ctypes.byref(rows), *map(c_float, factors), *out)
        return index[:count].clone(), held[:count].clone(), wanted[:count].clone()

    def _rows(self, side: int, weight: torch.Tensor, meta: torch.Tensor) -> SideRows:
        layers, heads, count = weight.shape
        return SideRows(
            heads=layers * heads,
            count=count,
            weight=weight.data_ptr(),
            meta=meta.data_ptr(),
            meta_stride=head_stride(meta[..., 0]),
            thresholds=self._thresholds[side].data_ptr(),
        )


@dataclass(frozen=True)
class WeightedTokens:
    """Weights of tokens, float32 [layers, kv_heads, n], and the meta bytes of their rows."""

    weight: torch.Tensor
    metas: tuple[torch.Tensor, torch.Tensor]


class NativeAllocator(Allocator):
    """The balanced policy in C++, which looks up a row's thresholds by its meta byte."""

    def __init__(self, policy: BalancedPolicy, codec: Codec, statistic: AttentionStatistic, library: Any) -> None:
        super().__init__(policy, codec, statistic)
        every = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1)
        scales = codec.affine(every)[0]
        thresholds = [table.thresholds(scales).permute(1, 2, 3, 0).contiguous() for table in policy.tables]
        self._native = _Rules(library, statistic.importance(every).flatten(), thresholds)

    def update_statistic(self, state: torch.Tensor, reduction: torch.Tensor, position: int) -> None:
        if isinstance(self.statistic, DecayingMeanSquare):
            self._native.update_statistic(state, reduction, self.statistic.keep, position)
        else:
            super().update_statistic(state, reduction, position)

    def demand(self, kept: TokenState) -> WeightedTokens:
        return WeightedTokens(self._native.weigh(kept.state, kept.first, kept.shape[2]), kept.metas)

    def widths(self, demand: WeightedTokens, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (self._native.widths(s, demand.weight, demand.metas[s], need / lam) for s in (KEY, VALUE))
        return keys, values

    def width_changes(
        self, demand: WeightedTokens, tags: torch.Tensor, lam: float, most: float | None, least: float | None
    ) -> tuple[WidthChanges, WidthChanges]:
        factors = [math.nan if need is None else need / lam for need in (most, 1.0, least)]
        keys, values = (
            WidthChanges(*self._native.width_changes(side, demand.weight, demand.metas[side], tags, factors))
            for side in (KEY, VALUE)
        )
        return keys, values
