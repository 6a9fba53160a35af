"""Weights of linear layers in forms that a CPU multiplies with faster, in torch's own operations.

Activations outside of these layers, attention and the cache stay in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from qaq_core.base.errors import ConfigError
from qaq_core.kernels import native_library
from qaq_core.kernels.dense import MOST_ROWS, NativeDense

WEIGHTS = ("auto", "plain", "float32", "bfloat16", "int8", "int4")
"""plain: the layers as transformers makes them. float32: the same weights, multiplied with few rows by the C++ library
and with many by oneDNN. bfloat16: reordered once for oneDNN. int8: a scale for each output. int4: a scale and an offset
for every 32 inputs. With the last two the output layer is bfloat16. auto: float32 where that can be, else plain."""
LOSSLESS = ("plain", "float32")
"""Those that change numbers by the order of sums only."""
GROUP_SIZE = 32
"""Inputs that share a scale in int4, as in GGUF's Q4_1."""
_OUTPUTS = 16
"""int4's outputs come in so many at a time."""


def pack(model: Any, weights: str) -> str:
    """Replaces the linear layers of a float32 model on the CPU. It then cannot be trained or saved, and calibrated
    only with float32 ones.

    Args:
        weights: one of WEIGHTS.
    Returns:
        which weights the model has now; never "auto".
    Raises:
        ConfigError: unknown weights, or not for this model or this processor.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"unknown weights {weights!r}; take {', '.join(WEIGHTS)}")
    if weights == "auto":
        fits = model.device.type == "cpu" and model.dtype == torch.float32
        weights = "float32" if fits and torch.backends.mkldnn.is_available() else "plain"
    if weights == "plain":
        return weights
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ConfigError(f"{weights} weights are for models in float32 on the CPU; take plain ones")
    if not torch.backends.mkldnn.is_available():
        raise ConfigError(f"{weights} weights need a torch with oneDNN; take plain ones")
    if weights != "float32" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ConfigError(f"{weights} weights need a processor with AVX-512; take plain or float32 ones")
    output = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            coarse = layer is output and weights not in LOSSLESS
            model.set_submodule(name, _packed(name, layer, "bfloat16" if coarse else weights))
    return weights


def _packed(name: str, layer: nn.Linear, weights: str) -> nn.Module:
    if weights == "int8":
        return Int8Linear(layer)
    if weights == "int4":
        if layer.in_features % GROUP_SIZE or layer.out_features % _OUTPUTS:
            raise ConfigError(f"{name} has sizes that int4 weights are not for; take int8 ones")
        return Int4Linear(layer)
    return Float32Linear(layer) if weights == "float32" else OneDnnLinear(layer)


class PackedLinear(nn.Module, ABC):
    """y = x·Wᵀ + b for float32 x, in inference."""

    bias: torch.Tensor | None
    differentiable = False
    """Whether gradients reach x; those of weights are never made."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, dtype
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.differentiable and torch.is_grad_enabled() and x.requires_grad:
            raise ConfigError("these weights have no gradients; take plain or float32 ones to calibrate")
        rows = self.multiply(x.reshape(-1, self.in_features).to(self.dtype))
        return rows.to(x.dtype).view(*x.shape[:-1], self.out_features)

    @abstractmethod
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, out_features] of [rows, in_features], both in `dtype`."""


class Float32Linear(PackedLinear):
    """The layer's own weights, which it shares with whatever else they are tied to."""

    weight: torch.Tensor
    differentiable = True

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer, torch.float32)
        self.register_buffer("weight", layer.weight.detach(), persistent=False)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.qaq.linear(x, self.weight, self.bias, self.out_features)
        return y


class OneDnnLinear(PackedLinear):
    """Weights in bfloat16, in the order that oneDNN wants."""

    weight: torch.Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer, torch.bfloat16)
        with torch.no_grad():
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().bfloat16(), 1)
        self.register_buffer("weight", weight, persistent=False)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.qaq.linear(x, self.weight, self.bias, self.out_features)
        return y


class Int8Linear(PackedLinear):
    """Rounded to 255 levels, with a scale for each output; multiplied with activations in bfloat16."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer, torch.bfloat16)
        weight = layer.weight.detach()
        scale = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny).bfloat16()
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8))

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class Int4Linear(PackedLinear):
    """Rounded to 16 levels from the least to the greatest of GROUP_SIZE weights; activations in bfloat16."""

    weight: torch.Tensor
    affine: torch.Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer, torch.bfloat16)
        groups = layer.weight.detach().unflatten(1, (-1, GROUP_SIZE))
        least, greatest = groups.amin(-1), groups.amax(-1)
        # Levels are counted from the eighth, so that is what is rounded to bfloat16.
        scale = ((greatest - least) / 15).clamp_min(torch.finfo(torch.float32).tiny).bfloat16()
        eighth = (least + 8 * scale.float()).bfloat16()
        levels = ((groups - eighth.float()[..., None]) / scale.float()[..., None]).round() + 8
        levels = levels.clamp(0, 15).flatten(1).to(torch.int32)
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1))
        self.register_buffer("affine", torch.stack([scale, eighth], -1).transpose(0, 1).contiguous())

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, GROUP_SIZE, self.affine)
        return y if self.bias is None else y + self.bias


# The product under a name of its own: under torch's, torch.compile wants oneDNN's weights to be constants.
_library = torch.library.Library("qaq", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias, int outputs) -> Tensor")


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, outputs: int) -> torch.Tensor:
    if weight.dtype == torch.float32 and len(x) <= MOST_ROWS and x.shape[1] % 16 == 0:
        library = native_library(x.device)
        if library is not None:
            return NativeDense(library).multiply(x.contiguous(), weight, bias)
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _linear_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, outputs: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], outputs))


_library.impl("linear", _linear, "CPU")
_library.impl("linear", _linear, "MkldnnCPU")
torch.library.register_fake("qaq::linear", _linear_shape, lib=_library)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.weight = inputs[1]  # save_for_backward does not take oneDNN's tensors


def _linear_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return gradient @ ctx.weight.to_dense(), None, None, None


torch.library.register_autograd("qaq::linear", _linear_gradient, setup_context=_keep_weight, lib=_library)
