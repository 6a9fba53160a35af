"""Attention over packed tokens. One file per implementation."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Protocol

import torch

from qaq_core.attention.cpu import CpuAttention, library
from qaq_core.attention.reference import LayerTokens, Observer, ReferenceAttention
from qaq_core.codecs import Codec
from qaq_core.errors import ConfigError

KERNELS = ("auto", "cpu", "reference")
log = logging.getLogger(__name__)

__all__ = ["KERNELS", "Attention", "CpuAttention", "LayerTokens", "Observer", "ReferenceAttention", "make"]


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


def make(codec: Codec, device: torch.device, kernel: str | None = None) -> Attention:
    """The attention to use on a device.

    Args:
        kernel: one of KERNELS; the environment's QAQ_KERNEL if not given. "auto" takes the fastest there is.
    Raises:
        ConfigError: the kernel is unknown, or cannot run here.
    """
    kernel = kernel or os.environ.get("QAQ_KERNEL", "auto")
    if kernel not in KERNELS:
        raise ConfigError(f"QAQ_KERNEL must be one of {', '.join(KERNELS)}, not {kernel!r}")
    if kernel == "cpu" and device.type != "cpu":
        raise ConfigError(f"QAQ_KERNEL=cpu cannot run on {device.type}: set QAQ_KERNEL=auto")
    if kernel == "cpu" and library() is None:
        raise ConfigError("QAQ_KERNEL=cpu, but its library is not built: install a C++ compiler and reinstall QAQ")
    chosen: Attention
    if kernel != "reference" and device.type == "cpu" and library() is not None:
        chosen = CpuAttention(codec)
    else:
        chosen = ReferenceAttention(codec, device)
    _say(chosen.name, device.type == "cpu" and kernel == "auto" and library() is None)
    return chosen


@cache
def _say(name: str, missing: bool) -> None:
    """Says once which kernel runs."""
    hint = "; a C++ compiler and a reinstall would give the fast one" if missing else ""
    log.info("attention kernel: %s%s", name, hint)
