"""Attention over packed tokens. One file per implementation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch

from qaq_core import native
from qaq_core.attention import triton
from qaq_core.attention.cpu import CpuAttention
from qaq_core.attention.reference import LayerTokens, Observer, ReferenceAttention
from qaq_core.attention.triton import TritonAttention
from qaq_core.codecs import Codec
from qaq_core.native import KERNELS

log = logging.getLogger(__name__)

__all__ = [
    "KERNELS",
    "Attention",
    "CpuAttention",
    "LayerTokens",
    "Observer",
    "ReferenceAttention",
    "TritonAttention",
    "faster",
    "make",
]


class Attention(Protocol):
    """Causal attention of a sequence's last positions over everything one layer holds of it."""

    @property
    def name(self) -> str: ...

    def __call__(
        self,
        query: torch.Tensor,
        tokens: LayerTokens,
        scaling: float,
        sliding_window: int | None = None,
        observe: Observer | None = None,
    ) -> torch.Tensor:
        """See `ReferenceAttention`, which defines what is computed."""
        ...

    def batch(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[Observer | None],
    ) -> torch.Tensor:
        """The same for several sequences, query and result [batch, query_heads, n, head_dim]."""
        ...


def make(codec: Codec, device: torch.device, kernel: str | None = None) -> Attention:
    """The attention to use on a device.

    Args:
        kernel: see `native.find`; "auto" takes Triton on CUDA devices.
    """
    kernel = native.chosen(kernel)
    chosen: Attention
    hint = None
    if kernel == "triton" or (kernel == "auto" and device.type == "cuda" and triton.missing(device) is None):
        chosen = TritonAttention(codec, device)
    elif native.find(device, kernel) is not None:
        chosen = CpuAttention(codec)
    else:
        chosen = ReferenceAttention(codec, device)
        hint = faster(device) if kernel == "auto" else None
    _say(chosen.name, hint)
    return chosen


def faster(device: torch.device) -> str | None:
    """What to do for a faster kernel than the reference, if a device has one."""
    if device.type == "cuda":
        return triton.missing(device)
    return native.missing() if device.type == "cpu" else None


@cache
def _say(name: str, hint: str | None) -> None:
    """Says once which kernel runs."""
    log.info("attention kernel: %s%s", name, f"; for a faster one: {hint}" if hint else "")
