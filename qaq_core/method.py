"""The method: everything that all sequences of one model share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qaq_core import allocation
from qaq_core import attention as kernels
from qaq_core.adaptation import Adaptation
from qaq_core.allocation import Allocator
from qaq_core.attention import Attention
from qaq_core.errors import ConfigError
from qaq_core.outliers import Outliers, split_outliers
from qaq_core.pages import KEY, PAGE_TOKENS, VALUE, PageShape, dtype_name
from qaq_core.policies import Policy
from qaq_core.policies.balanced import SINKS
from qaq_core.quantizer import Quantizer
from qaq_core.shape import ModelShape
from qaq_core.window import Window

if TYPE_CHECKING:
    from qaq_core.originals import Originals
    from qaq_core.sequence import SequenceCache

GROUP = 8
"""Tokens leave the recent window this many at a time, and this many always stay."""

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Target:
    """What a sequence should hold after its prompt. One of them; compression wins over bits, error over both.

    Attributes:
        bits: mean code bits per element.
        compression: resident, against fp16.
        error: predicted KL from full precision, in nats per decoded token.
    """

    bits: float | None = None
    compression: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and not 0 < self.bits <= 16:
            raise ConfigError(f"target_bits must be over 0 and at most 16, not {self.bits}")
        if self.compression is not None and not 1 <= self.compression <= 32:
            raise ConfigError(f"target_compression must be from 1 to 32, not {self.compression}")
        if self.error is not None and not 0 < self.error <= 10:
            raise ConfigError(f"target_error must be over 0 and at most 10 nats, not {self.error}")

    @property
    def given(self) -> bool:
        return any(value is not None for value in (self.bits, self.compression, self.error))


@dataclass(frozen=True)
class Method:
    """Frame and codec, policy and window, and the attention that reads what they make.

    Attributes:
        dtype: of keys and values as the model makes them, and so of originals.
        window_dtype: of sinks and recent tokens; half precision where the model computes in float32.
        sinks: first tokens that stay exact for good.
        group: tokens that leave the recent window at a time; as many always stay.
        kernel: which attention to run, one of `attention.KERNELS`; the environment's QAQ_KERNEL if not given.
        outlier_ratio: share of numbers kept beside the codes; 0 for none.
        adaptation: what a sequence's quantizer takes from its first packed tokens; None if all have the model's.
    """

    preset: str
    shape: ModelShape
    quantizer: Quantizer
    policy: Policy
    window: Window
    dtype: torch.dtype
    device: torch.device
    target: Target = Target()
    sinks: int = SINKS
    group: int = GROUP
    outlier_ratio: float = 0.0
    adaptation: Adaptation | None = None
    page_tokens: int = PAGE_TOKENS
    kernel: str | None = None
    attention: Attention = field(init=False)
    allocator: Allocator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantizer", self.quantizer.using(self.kernel))
        codec, device, kernel = self.quantizer.codec, self.device, self.kernel
        object.__setattr__(self, "attention", kernels.make(codec, device, kernel))
        chosen = allocation.make(self.policy, codec, self.window, device, kernel)
        object.__setattr__(self, "allocator", chosen)

    @classmethod
    def for_model(
        cls, model: Any, fingerprint: str | None = None, preset: str = "balanced", **settings: Any
    ) -> Method:
        """The method of a preset for a transformers causal LM, which is switched to QAQ's attention.

        Args:
            fingerprint: of the model's weights; finds its calibration without hashing them.
            settings: of the preset, see `presets`; and target_bits, target_compression, target_error,
                page_tokens, kernel.
        Raises:
            UnsupportedModelError, ConfigError.
        """
        from qaq_core.attention.transformers import use_qaq_attention
        from qaq_core.presets import build

        method = build(model, fingerprint, preset, **settings)
        use_qaq_attention(model)
        return method

    def sequence(
        self,
        originals: Originals | None = None,
        page_name: Callable[[int], bytes] | None = None,
        wait: bool = False,
    ) -> SequenceCache:
        """An empty sequence, see `SequenceCache`."""
        from qaq_core.sequence import SequenceCache

        return SequenceCache(self, originals, page_name, wait)

    @property
    def window_dtype(self) -> torch.dtype:
        return torch.float16 if self.dtype == torch.float32 else self.dtype

    @property
    def page_shape(self) -> PageShape:
        shape = self.shape
        return PageShape(shape.layers, shape.kv_heads, self.page_tokens, shape.head_dim, dtype_name(self.dtype))

    def measure(
        self, quantizer: Quantizer, originals: torch.Tensor, start: int, spent: bool = False
    ) -> tuple[Pair, Pair, tuple[Outliers | None, Outliers | None]]:
        """Rows, meta bytes and outliers of originals [layers, 2, kv_heads, n, head_dim] from position `start`.

        Args:
            quantizer: the sequence's.
            spent: see `Quantizer.rows`.
        """
        rows, metas, outliers = [], [], []
        for side in (KEY, VALUE):
            row = quantizer.rows(side, originals[:, side], start, spent)
            kept, mask = (None, None)
            if self.outlier_ratio > 0:
                kept, mask = split_outliers(row, self.outlier_ratio, getattr(quantizer.codec, "group", "head"))
            rows.append(row)
            metas.append(quantizer.measure(row, mask))
            outliers.append(kept)
        return (rows[0], rows[1]), (metas[0], metas[1]), (outliers[0], outliers[1])

    def target_bits(self, length: int, packed: int, fixed_bytes: int) -> float | None:
        """Mean code bits per element that meet the target, or None if there is none.

        Args:
            length: tokens of the sequence; `packed` of them hold codes, everything else takes `fixed_bytes`.
        """
        if self.target.compression is None:
            return self.target.bits
        per_token = self.shape.layers * 2 * self.shape.kv_heads * self.shape.head_dim
        allowed = length * per_token * 2 / self.target.compression - fixed_bytes
        return max(0.5, allowed * 8 / (packed * per_token))
