"""Backends: the one place that picks C++, Triton or torch for a device."""

from __future__ import annotations

import logging
import os
from functools import cache, partial
from typing import Any

import torch

from qaq_core.allocation import Allocator, AttentionStatistic, BalancedPolicy, Policy
from qaq_core.attention import Attention, CpuAttention, ReferenceAttention, TritonAttention, triton_missing
from qaq_core.base.errors import ConfigError
from qaq_core.kernels import NativeAllocator, NativeEncoder, NativeRepacker, load_library, missing_library
from qaq_core.quantization import Codec, Encoder, MakeEncoder, TorchEncoder, Transform
from qaq_core.quantization.encoder import Layouts
from qaq_core.storage import Repacker, TorchRepacker

KERNELS = ("auto", "cpu", "triton", "reference")

log = logging.getLogger(__name__)


def kernel_name(kernel: str | None) -> str:
    """One of KERNELS: the one named, else the environment's QAQ_KERNEL, else "auto".

    Raises:
        ConfigError: there is none of that name.
    """
    kernel = kernel or os.environ.get("QAQ_KERNEL", "auto")
    if kernel not in KERNELS:
        raise ConfigError(f"QAQ_KERNEL must be one of {', '.join(KERNELS)}, not {kernel!r}")
    return kernel


def native_library(device: torch.device, kernel: str | None = None) -> Any | None:
    """The C++ library if it is to be used on a device, else None: then torch operations run.

    Args:
        kernel: one of KERNELS; the environment's QAQ_KERNEL if not given. "auto" takes the fastest there is.
    Raises:
        ConfigError: the kernel is unknown, or cannot run here.
    """
    kernel = kernel_name(kernel)
    if kernel == "cpu" and device.type != "cpu":
        raise ConfigError(f"QAQ_KERNEL=cpu cannot run on {device.type}: set QAQ_KERNEL=auto")
    if kernel == "cpu" and load_library() is None:
        raise ConfigError(f"QAQ_KERNEL=cpu, but {missing_library()}")
    return load_library() if kernel != "reference" and device.type == "cpu" else None


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


def make_encoder(kernel: str | None = None) -> MakeEncoder:
    """What chooses a quantizer's encoder; see `native_library` for `kernel`."""
    return partial(_encoder, kernel)


def _encoder(kernel: str | None, transform: Transform, codec: Codec, layouts: Layouts, device: torch.device) -> Encoder:
    reference, native = TorchEncoder(transform, codec, layouts), native_library(device, kernel)
    return reference if native is None else NativeEncoder(native, transform, codec, layouts, reference)


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


def faster_kernel(device: torch.device) -> str | None:
    """What to do for a faster kernel than the reference; None if the device has none."""
    if device.type == "cuda":
        return triton_missing(device)
    return missing_library() if device.type == "cpu" else None


@cache
def _log_kernel(name: str, hint: str | None) -> None:
    """Logs once which kernel runs."""
    log.info("attention kernel: %s%s", name, f"; for a faster one: {hint}" if hint else "")
