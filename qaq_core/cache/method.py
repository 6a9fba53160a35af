"""The method: everything that all sequences of one model share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from qaq_core.allocation import Allocator, AttentionStatistic, BalancedPolicy, FixedPolicy, Policy, StepErrors, Target
from qaq_core.allocation.policies.balanced import SINKS
from qaq_core.allocation.requantize import Requantizer
from qaq_core.attention import Attention, ReferenceAttention
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, PAGE_TOKENS, VALUE, PageShape, dtype_name
from qaq_core.cache import backends
from qaq_core.cache.in_time import InTime, InTimeLimits
from qaq_core.models import ModelShape
from qaq_core.quantization import Adaptation, Outliers, Quantizer, split_outliers
from qaq_core.storage import Repacker, Weaver

PACK_TOKENS = 8
"""Tokens leave the residual window in groups of this size, and this many always stay."""

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Method:
    """Transform and codec, policy and attention statistic, and the kernels that run them.

    Attributes:
        new_sequence: makes an empty sequence of this method; see `sequence`.
        dtype: of the model's keys and values, and so of originals.
        sinks: first tokens that are never packed.
        pack_tokens: tokens that leave the residual window at a time; as many always stay.
        kernel: which kernels to run, one of `kernels.KERNELS`; the environment's QAQ_KERNEL if not given.
        outlier_ratio: share of numbers stored beside the codes; 0 for none.
        adaptation: makes a sequence's own quantizer from its first packed tokens; None if all use the model's.
        in_time: bounds of exceptions in time; None for none.
    """

    preset: str
    shape: ModelShape
    quantizer: Quantizer
    policy: Policy
    statistic: AttentionStatistic
    dtype: torch.dtype
    device: torch.device
    new_sequence: Callable[..., Any]
    target: Target = field(default_factory=Target)
    sinks: int = SINKS
    pack_tokens: int = PACK_TOKENS
    outlier_ratio: float = 0.0
    adaptation: Adaptation | None = None
    page_tokens: int = PAGE_TOKENS
    kernel: str | None = None
    in_time: InTimeLimits | None = None
    attention: Attention = field(init=False)
    allocator: Allocator = field(init=False)
    repacker: Repacker | Weaver = field(init=False)
    _step_errors: StepErrors | None = field(init=False, default=None)
    _single_rows: ReferenceAttention | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        codec, device, kernel = self.quantizer.codec, self.device, self.kernel
        attention = backends.make_attention(codec, device, kernel)
        made = {
            "quantizer": self.quantizer.using(backends.make_encoders(device, kernel, attention)),
            "attention": attention,
            "allocator": backends.make_allocator(self.policy, codec, self.statistic, device, kernel),
            "repacker": backends.make_repacker(device, kernel, attention, self.shape),
        }
        if self.in_time is not None:
            if not isinstance(self.policy, BalancedPolicy):
                raise ConfigError(f"the {self.preset} preset has no exceptions in time: only balanced predicts errors")
            made["_single_rows"] = ReferenceAttention(codec, device)
            made["_step_errors"] = backends.make_step_errors(self.policy, codec, self.shape.head_dim, device, kernel)
        for name, part in made.items():
            object.__setattr__(self, name, part)

    @property
    def attentive(self) -> bool:
        """Whether the attention that a token gets decides how many bits it holds."""
        return not isinstance(self.policy, FixedPolicy)

    def sequence(self, *args: Any, **kwargs: Any) -> Any:
        """An empty sequence, see `SequenceCache`."""
        return self.new_sequence(self, *args, **kwargs)

    def exceptions_in_time(self, requantizer: Requantizer) -> InTime | None:
        """What corrects a sequence's decode steps; None without exceptions in time."""
        if self.in_time is None or self._step_errors is None or self._single_rows is None:
            return None
        return InTime(self._step_errors, self._single_rows, self.in_time, requantizer)

    @property
    def residual_dtype(self) -> torch.dtype:
        """Of sinks and recent tokens: half precision where the model computes in float32."""
        return torch.float16 if self.dtype == torch.float32 else self.dtype

    @property
    def page_shape(self) -> PageShape:
        shape = self.shape
        return PageShape(shape.layers, shape.kv_heads, self.page_tokens, shape.head_dim, dtype_name(self.dtype))

    def prepare(
        self, quantizer: Quantizer, originals: torch.Tensor, start: int, overwrite: bool = False
    ) -> tuple[Pair, Pair, tuple[Outliers | None, Outliers | None]]:
        """Rows, meta bytes and outliers of originals [layers, 2, kv_heads, n, head_dim] from position `start`.

        Args:
            quantizer: the sequence's.
            overwrite: see `Quantizer.rows`.
        """
        rows, metas, outliers = [], [], []
        for side in (KEY, VALUE):
            row = quantizer.rows(side, originals[:, side], start, overwrite)
            kept, mask = (None, None)
            if self.outlier_ratio > 0:
                kept, mask = split_outliers(row, self.outlier_ratio, getattr(quantizer.codec, "granularity", "head"))
            rows.append(row)
            metas.append(quantizer.meta(row, mask))
            outliers.append(kept)
        return (rows[0], rows[1]), (metas[0], metas[1]), (outliers[0], outliers[1])
