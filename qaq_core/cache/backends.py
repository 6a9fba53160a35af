"""Backends: which of C++, Triton and torch runs a method; `kernels.choice` says whether the C++ library may."""

from __future__ import annotations

import logging
from functools import cache

import torch

from qaq_core.allocation import Allocator, AttentionStatistic, BalancedPolicy, Policy, StepErrors
from qaq_core.attention import Attention, CpuAttention, ReferenceAttention, TritonAttention, triton_missing
from qaq_core.kernels import (
    NativeAllocator,
    NativeRepacker,
    NativeStepErrors,
    kernel_name,
    missing_library,
    native_library,
)
from qaq_core.quantization import Codec
from qaq_core.storage import Repacker, TorchRepacker

log = logging.getLogger(__name__)


def make_attention(codec: Codec, device: torch.device, kernel: str | None = None) -> Attention:
    """The attention of a device. "auto" takes Triton on CUDA devices; see `native_library` for `kernel`."""
    kernel = kernel_name(kernel)
    chosen: Attention
    hint = None
    if kernel == "triton" or (kernel == "auto" and device.type == "cuda" and triton_missing(device) is None):
        chosen = TritonAttention(codec, device)
    elif (native := native_library(device, kernel)) is not None:
        chosen = CpuAttention(codec, native)
    else:
        chosen = ReferenceAttention(codec, device)
        hint = faster_kernel(device) if kernel == "auto" else None
    _log_kernel(chosen.name, hint)
    return chosen


def make_repacker(device: torch.device, kernel: str | None = None) -> Repacker:
    """The repacker of a device; see `native_library` for `kernel`."""
    native = native_library(device, kernel)
    return TorchRepacker() if native is None else NativeRepacker(native)


def make_allocator(
    policy: Policy, codec: Codec, statistic: AttentionStatistic, device: torch.device, kernel: str | None = None
) -> Allocator:
    """The allocator of a device; see `native_library` for `kernel`."""
    native = native_library(device, kernel)
    one_byte_each = codec.meta_bytes == 1 and statistic.bytes_per_token == 1
    if native is not None and one_byte_each and isinstance(policy, BalancedPolicy):
        return NativeAllocator(policy, codec, statistic, native)
    return Allocator(policy, codec, statistic)


def make_step_errors(
    policy: BalancedPolicy, codec: Codec, head_dim: int, device: torch.device, kernel: str | None = None
) -> StepErrors:
    """What steps' errors cost, on a device; see `native_library` for `kernel`."""
    native = native_library(device, kernel)
    if native is None:
        return StepErrors(policy, codec, head_dim)
    return NativeStepErrors(policy, codec, head_dim, native)


def faster_kernel(device: torch.device) -> str | None:
    """What to do for a faster kernel than the reference; None if the device has none."""
    if device.type == "cuda":
        return triton_missing(device)
    return missing_library() if device.type == "cpu" else None


@cache
def _log_kernel(name: str, hint: str | None) -> None:
    """Logs once which kernel runs."""
    log.info("attention kernel: %s%s", name, f"; for a faster one: {hint}" if hint else "")
