"""What quantization costs one decode step, by what this very step attends to.

A policy predicts the loss of later steps from the attention that tokens have had. Here the same costs are applied to
the squared probabilities p² of one step:

    error = ½ · head_dim · Σ p² / Σ s · Σ over keys and values of mean_o c_o · D(b_o) · scale_o²

in nats, summed over layers, KV heads and packed tokens. s is the attention statistic, to whose mean the costs c are
relative. kernels/step_error.py does it in C++.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from qaq_core.allocation.policies import BalancedPolicy
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import WIDTHS
from qaq_core.quantization.bit_planes import width_index
from qaq_core.quantization.codecs import Codec
from qaq_core.storage import PackedTokens

NEGLIGIBLE = 1e-9
"""A token whose p² makes at most this share of Σ s, times half of head_dim, counts as without error."""

MOST_FOUND = 1024
"""Tokens of one layer and step that are found at most, the first ones."""


@dataclass(frozen=True)
class Found:
    """n packed tokens of one layer whose error exceeds a limit, by head and then by token.

    Attributes:
        head, token: int64 [n]; tokens count from the first packed one.
        error: float32 [n], in nats.
    """

    head: torch.Tensor
    token: torch.Tensor
    error: torch.Tensor

    def __len__(self) -> int:
        return len(self.error)

    def largest(self, count: int) -> Found:
        """The `count` of the largest errors, in the same order."""
        if len(self) <= count:
            return self
        return self.of(self.error.argsort(descending=True, stable=True)[:count].sort().values)

    def of(self, index: torch.Tensor) -> Found:
        """Some of them, by index."""
        return Found(self.head[index], self.token[index], self.error[index])


class StepError(Protocol):
    """The error of one step, layer by layer."""

    def look(self, layer: int, least: float) -> Found | None:
        """Adds a layer, whose p² are known now; returns the tokens whose error is above `least`, if there are any."""
        ...

    @property
    def total(self) -> float:
        """The error, in nats, of the layers so far."""
        ...


class StepErrors:
    """Errors of the steps of all sequences of a method.

    Args:
        policy: has the costs.
        codec: one of one meta byte a row.

    Attributes:
        lost: of keys and values, float32 [layers, kv_heads, 256, widths]: mean_o c_o · D(b_o) · scale_o², by meta byte
            and width.
    """

    def __init__(self, policy: BalancedPolicy, codec: Codec, head_dim: int) -> None:
        every = torch.arange(256, dtype=torch.uint8, device=policy.device).view(1, 1, 256, 1)
        scales = codec.affine(every)[0]
        self.lost = tuple(table.by_meta(scales) for table in policy.tables)
        self._half_dim = head_dim / 2

    def factors(self, importance: torch.Tensor, sinks: int) -> torch.Tensor:
        """What a unit of p² counts: float32 [layers, kv_heads].

        Args:
            importance: float32 [layers, kv_heads, length], the statistic s. Of sinks it does not count.
        """
        total = importance[:, :, sinks:].sum(-1, dtype=torch.float64)
        return torch.where(total > 0, self._half_dim / total, 0.0).float()

    def step(self, packed: PackedTokens, observed: torch.Tensor, factors: torch.Tensor) -> StepError:
        """The error of a step.

        Args:
            observed: float32 [layers, kv_heads, tokens], p² of all tokens by position; written layer by layer.
        """
        return _TorchStepError(self.lost, packed, observed, factors)


class _TorchStepError:
    def __init__(
        self, lost: tuple[torch.Tensor, ...], packed: PackedTokens, observed: torch.Tensor, factors: torch.Tensor
    ) -> None:
        self._lost, self._packed, self._factors = lost, packed, factors
        self._observed = observed[:, :, packed.start : packed.stop]
        self.total = 0.0

    def look(self, layer: int, least: float) -> Found | None:
        """See `StepError`."""
        packed = self._packed
        felt = self._observed[layer] * self._factors[layer].unsqueeze(-1)
        lost = [self._lost_by(side, layer) for side in (KEY, VALUE)]
        error = torch.where(felt > NEGLIGIBLE, felt * (lost[KEY] + lost[VALUE]), 0.0)
        self.total += float(error.sum(dtype=torch.float64))
        index = torch.nonzero(error.view(-1) > least).squeeze(1)[:MOST_FOUND]
        if not len(index):
            return None
        return Found(index // len(packed), index % len(packed), error.view(-1)[index])

    def _lost_by(self, side: int, layer: int) -> torch.Tensor:
        """Float32 [kv_heads, tokens]."""
        packed = self._packed
        meta = packed.metas[side].expand(*packed.tags.shape, 1)[layer, :, :, 0]
        place = meta.long() * len(WIDTHS) + width_index(packed.tags[layer], side)
        return self._lost[side][layer].flatten(1).gather(1, place)
