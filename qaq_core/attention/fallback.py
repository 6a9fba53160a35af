"""Kernels with a fallback: they compute one query position, and prompts where they can; the reference all else."""

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
"""Types of tokens in the residual window that kernels support."""
PROMPT = "a prompt"
"""The reason of a call that `decode` does not take because it is no decode step."""


class KernelWithFallback(ABC):
    """An implementation of `Attention` for one query position; prompts are the reference's unless `prompt` is defined.

    Attributes:
        fallbacks: number of calls that the reference computed, by reason.
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

    def prompt(
        self,
        query: torch.Tensor,
        tokens: LayerTokens,
        scaling: float,
        sliding_window: int | None,
        observer: Observer | None,
    ) -> torch.Tensor:
        """[query_heads, n, head_dim] of queries of a prompt, see `Attention`."""
        return self.refer(PROMPT, query, tokens, scaling, sliding_window, observer)

    def __call__(
        self,
        query: torch.Tensor,
        tokens: LayerTokens,
        scaling: float,
        sliding_window: int | None = None,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """See `Attention`."""
        if self.unsupported(query, tokens, observer) == PROMPT:
            return self.prompt(query, tokens, scaling, sliding_window, observer)
        return self.batch(query.unsqueeze(0), [tokens], scaling, sliding_window, [observer])[0]

    def batch(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[Observer | None],
    ) -> torch.Tensor:
        """See `Attention`."""
        reasons = [self.unsupported(query, mine, observer) for mine, observer in zip(tokens, observers, strict=True)]
        supported = [i for i, reason in enumerate(reasons) if reason is None]
        if len(supported) == len(tokens):
            return self.decode(query.squeeze(2), tokens, scaling, sliding_window, observers)  # type: ignore[arg-type]
        out = torch.empty(query.shape, device=query.device)
        for i, reason in enumerate(reasons):
            given = (query[i], tokens[i], scaling, sliding_window, observers[i])
            if reason is not None:
                out[i] = self.prompt(*given) if reason == PROMPT else self.refer(reason, *given)
        if supported:
            mine, observing = [tokens[i] for i in supported], [observers[i] for i in supported]
            out[supported] = self.decode(query[supported].squeeze(2), mine, scaling, sliding_window, observing)  # type: ignore[arg-type]
        return out

    def unsupported(self, query: torch.Tensor, tokens: LayerTokens, observer: Observer | None) -> str | None:
        """Why `decode` does not support a call; None if it does."""
        if query.shape[-2] != 1 or not (observer is None or isinstance(observer, StepObserver)):
            return PROMPT
        return self.limits(query, tokens)

    def limits(self, query: torch.Tensor, tokens: LayerTokens) -> str | None:
        """Why the kernel does not support queries over these tokens, however many they are; None if it does."""
        packed, keys, values = tokens.packed, tokens.keys, tokens.values
        if not supports_head_dim(query.shape[-1]):
            return f"a head_dim of {query.shape[-1]}"
        if keys.dtype != values.dtype or keys.dtype not in DTYPES:
            return f"{keys.dtype} keys with {values.dtype} values"
        if any(rows.stride(1) != rows.shape[2] or rows.stride(2) != 1 for rows in (keys, values)):
            return "rows that are not contiguous"
        if packed is not None and any(side.outliers is not None for side in packed.sides):
            return "outliers"
        return None

    def refer(
        self,
        reason: str,
        query: torch.Tensor,
        tokens: LayerTokens,
        scaling: float,
        sliding_window: int | None,
        observer: Observer | None,
    ) -> torch.Tensor:
        """The reference's result, which is counted."""
        self.fallbacks[reason] += 1
        if reason != PROMPT:
            _warn(self._kernel, reason)
        return self._reference(query, tokens, scaling, sliding_window, observer)


def supports_head_dim(head_dim: int) -> bool:
    """Whether decode kernels support a head_dim."""
    return head_dim % 16 == 0 and head_dim <= 256


@cache
def _warn(kernel: str, reason: str) -> None:
    log.warning(
        "the %s attention kernel does not support %s: torch operations run instead, more slowly", kernel, reason
    )


def transformed_queries(transforms: Sequence[Transform], layer: int, query: torch.Tensor) -> torch.Tensor:
    """Queries [heads, sequences, head_dim] to multiply with each sequence's packed keys."""
    if len(transforms) == 1:
        return transforms[0].query(layer, query)
    return torch.cat([transform.query(layer, query[:, i : i + 1]) for i, transform in enumerate(transforms)], 1)


def restored_outputs(transforms: Sequence[Transform], layer: int, output: torch.Tensor) -> torch.Tensor:
    """Sums of each sequence's packed values [heads, sequences, head_dim], transformed back."""
    if len(transforms) == 1:
        return transforms[0].restore(layer, output)
    return torch.cat([transform.restore(layer, output[:, i : i + 1]) for i, transform in enumerate(transforms)], 1)
