"""Whether the C++ library is to be used, and the encoders that a quantizer gets by that."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from qaq_core.base.errors import ConfigError
from qaq_core.kernels.encode import NativeEncoder
from qaq_core.kernels.library import load_library, missing_library
from qaq_core.quantization import Codec, Encoder, MakeEncoder, TorchEncoder, Transform
from qaq_core.quantization.encoder import Layouts

KERNELS = ("auto", "cpu", "cuda", "triton", "reference")


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


def make_encoder(kernel: str | None = None) -> MakeEncoder:
    """What chooses a quantizer's encoder; see `native_library` for `kernel`."""
    return partial(_encoder, kernel)


def _encoder(kernel: str | None, transform: Transform, codec: Codec, layouts: Layouts, device: torch.device) -> Encoder:
    reference, native = TorchEncoder(transform, codec, layouts), native_library(device, kernel)
    return reference if native is None else NativeEncoder(native, transform, codec, layouts, reference)
