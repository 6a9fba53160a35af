"""What kernels for decode share: they take one query position; what they do not take goes to the reference."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from qaq_core.allocation.attention_statistics import Observer, StepObserver
from qaq_core.attention.reference import LayerTokens, ReferenceAttention

if TYPE_CHECKING:
    from qaq_core.quantization.transforms import Transform

log = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of exact tokens."""
_PROMPT = "a prompt"


class KernelWithFallback(ABC):
    """An implementation of `Attention` for one query position.

    Attributes:
        fallbacks: calls that went to the reference, by why. Prompts always do.
    """

    def __init__(self, reference: ReferenceAttention, kernel: str) -> None:
        self.fallbacks: Counter[str] = Counter()
        self._reference, self._kernel = reference, kernel

    @abstractmethod
    def decode(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[StepObserver | None],
    ) -> torch.Tensor:
        """[batch, query_heads, 1, head_dim] of query [batch, query_heads, head_dim]."""

    def __call__(
        self,
        query: torch.Tensor,
        tokens: LayerTokens,
        scaling: float,
        sliding_window: int | None = None,
        observe: Observer | None = None,
    ) -> torch.Tensor:
        """See `Attention`."""
        return self.batch(query.unsqueeze(0), [tokens], scaling, sliding_window, [observe])[0]

    def batch(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[Observer | None],
    ) -> torch.Tensor:
        """See `Attention`."""
        reasons = [self.refuses(query, mine, observe) for mine, observe in zip(tokens, observers, strict=True)]
        taken = [i for i, reason in enumerate(reasons) if reason is None]
        if len(taken) == len(tokens):
            return self.decode(query.squeeze(2), tokens, scaling, sliding_window, observers)  # type: ignore[arg-type]
        out = torch.empty(query.shape, device=query.device)
        for i, reason in enumerate(reasons):
            if reason is not None:
                self._say(reason)
                out[i] = self._reference(query[i], tokens[i], scaling, sliding_window, observers[i])
        if taken:
            mine, watching = [tokens[i] for i in taken], [observers[i] for i in taken]
            out[taken] = self.decode(query[taken].squeeze(2), mine, scaling, sliding_window, watching)  # type: ignore[arg-type]
        return out

    def refuses(self, query: torch.Tensor, tokens: LayerTokens, observe: Observer | None) -> str | None:
        """Why the kernel does not take a call, or None if it does."""
        packed, keys, values = tokens.packed, tokens.keys, tokens.values
        if query.shape[2] != 1 or not (observe is None or isinstance(observe, StepObserver)):
            return _PROMPT
        if not takes(query.shape[3]):
            return f"a head_dim of {query.shape[3]}"
        if keys.dtype != values.dtype or keys.dtype not in DTYPES:
            return f"{keys.dtype} keys with {values.dtype} values"
        if any(rows.stride(1) != rows.shape[2] or rows.stride(2) != 1 for rows in (keys, values)):
            return "rows that are not contiguous"
        if packed is not None and any(side.outliers is not None for side in packed.sides):
            return "outliers"
        return None

    def _say(self, reason: str) -> None:
        self.fallbacks[reason] += 1
        if reason != _PROMPT:
            _warn(self._kernel, reason)


def takes(head_dim: int) -> bool:
    """Whether kernels do rows of that many numbers."""
    return head_dim % 16 == 0 and head_dim <= 256


@cache
def _warn(kernel: str, reason: str) -> None:
    log.warning("the %s attention kernel does not take %s: torch operations run instead, more slowly", kernel, reason)


def transformed(transforms: Sequence[Transform], layer: int, query: torch.Tensor) -> torch.Tensor:
    """Queries [heads, sequences, head_dim] as they meet each sequence's packed keys."""
    return torch.cat([transform.query(layer, query[:, i : i + 1]) for i, transform in enumerate(transforms)], 1)


def restored(transforms: Sequence[Transform], layer: int, output: torch.Tensor) -> torch.Tensor:
    """Sums of each sequence's packed values [heads, sequences, head_dim], as they were."""
    return torch.cat([transform.restore(layer, output[:, i : i + 1]) for i, transform in enumerate(transforms)], 1)
