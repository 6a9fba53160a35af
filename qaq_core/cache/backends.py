"""Backends: which of C++, Triton and torch runs a method; `kernels.choice` says whether the C++ library may."""

from __future__ import annotations

import logging
from functools import cache

import torch

from qaq_core.allocation import Allocator, AttentionStatistic, BalancedPolicy, Policy, StepErrors
from qaq_core.attention import (
    Attention,
    CpuAttention,
    CudaAttention,
    ReferenceAttention,
    TritonAttention,
    cuda_launcher,
    cuda_missing,
    refused_codec,
    triton_missing,
)
from qaq_core.kernels import (
    NativeAllocator,
    NativeRepacker,
    NativeStepErrors,
    kernel_name,
    make_encoder,
    missing_library,
    native_library,
)
from qaq_core.kernels.cuda.encode import cuda_encoders
from qaq_core.kernels.cuda.weave import CudaWeaver
from qaq_core.models import ModelShape
from qaq_core.quantization import Codec, MakeEncoder
from qaq_core.storage import Repacker, TorchRepacker, Weaver

log = logging.getLogger(__name__)


def make_attention(codec: Codec, device: torch.device, kernel: str | None = None) -> Attention:
    """The attention of a device; see `native_library` for `kernel`.

    On CUDA devices "auto" takes the kernels in CUDA C++ where they are compiled for the device and can read the codec's
    rows, else Triton.
    """
    kernel = kernel_name(kernel)
    chosen: Attention
    hint = None
    automatic = kernel == "auto" and device.type == "cuda"
    if kernel == "cuda" or (automatic and refused_codec(codec) is None and cuda_missing(device) is None):
        chosen = CudaAttention(codec, device, cuda_launcher(device))
    elif kernel == "triton" or (automatic and triton_missing(device) is None):
        chosen = TritonAttention(codec, device)
    elif (native := native_library(device, kernel)) is not None:
        chosen = CpuAttention(codec, native)
    else:
        chosen = ReferenceAttention(codec, device)
    if kernel == "auto":
        hint = faster_kernel(device, chosen.name)
    _log_kernel(chosen.name, hint)
    return chosen


def make_encoders(device: torch.device, kernel: str | None, attention: Attention) -> MakeEncoder:
    """What makes encoders: where CUDA kernels attend, they rotate rows on their device, too."""
    made = make_encoder(kernel)
    return cuda_encoders(attention.launcher, device, made) if isinstance(attention, CudaAttention) else made


def make_repacker(
    device: torch.device, kernel: str | None = None, attention: Attention | None = None, heads: ModelShape | None = None
) -> Repacker | Weaver:
    """The repacker of a device; see `native_library` for `kernel`.

    Where CUDA kernels attend to the heads of a model, rows are held as they read them, in tiles.
    """
    if isinstance(attention, CudaAttention) and heads is not None:
        refused = attention.refused(heads.head_dim, heads.query_heads // heads.kv_heads)
        if refused is None:
            return CudaWeaver(attention.launcher)
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


def faster_kernel(device: torch.device, running: str = "reference") -> str | None:
    """What to do for a faster kernel than the one that runs, by its name; None if the device has none."""
    if device.type == "cuda" and running in ("reference", "triton"):
        reasons = [cuda_missing(device), triton_missing(device) if running == "reference" else None]
        return "; ".join(reason for reason in reasons if reason) or None
    return missing_library() if device.type == "cpu" and running == "reference" else None


@cache
def _log_kernel(name: str, hint: str | None) -> None:
    """Logs once which kernel runs."""
    log.info("attention kernel: %s%s", name, f"; for a faster one: {hint}" if hint else "")
