"""TurboQuant (arXiv 2504.19874) in the forms that vLLM ships (`--kv-cache-dtype turboquant_4bit_nc` and so on).

Keys: a key is divided by its norm and rotated by a Hadamard matrix with random signs. Then its coordinates are close
to N(0, 1/head_dim), and each is rounded to the nearest level of the Lloyd–Max quantizer of that normal distribution.
The norm is kept in half precision. vLLM's suffix `nc` is norm correction: the rounded vector is scaled back to length
1 before it is multiplied with the norm. Here the quotient of the two norms is kept, which is the same number of bytes.

Values: as they are, not rotated; 2^b levels from a vector's minimum to its maximum, both included. Step and minimum
are in half precision. So a key takes b·head_dim bits and 2 bytes, a value 4 bytes beside its codes.

The paper's second stage (QJL on what rounding leaves, for unbiased products) is left out, as vLLM leaves it out. The
paper rotates by a random orthogonal matrix and fits levels to a coordinate of a random unit vector (a Beta
distribution); from 64 dims on, both differ little from what is here. vLLM does not quantize the first and last two
layers of a dense model. Here all layers are quantized, so that the same tokens are exact for all methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qaq_core import Method, Quantizer, Target
from qaq_core.allocation import FixedPolicy, NoStatistic
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache import Pair
from qaq_core.models import ModelShape
from qaq_core.quantization import Outliers, hadamard
from qaq_eval.baselines.hadamard import linear
from qaq_eval.baselines.index_codes import IndexCodec, IndexParameters, half, packable

NAME, PATTERN, TAKES_TARGET = "turboquant-<bits>bit", r"turboquant-(?:(\d)bit|k(\d)v(\d))", False
_ROUNDS = 2000
"""Lloyd's iteration ends when no level moves, or after so many rounds."""


def preset(
    model: Any, shape: ModelShape, target: Target, key_bits: int, value_bits: int | None = None
) -> dict[str, Any]:
    value_bits = key_bits if value_bits is None else value_bits
    if not (1 <= key_bits <= 8 and 1 <= value_bits <= 8):
        raise ConfigError(f"turboquant takes 1 to 8 bits, not {key_bits}/{value_bits}")
    rotation, identity = hadamard(shape.head_dim), torch.eye(shape.head_dim)
    return {
        "quantizer": Quantizer(linear(model, shape, rotation, identity), IndexCodec()),
        "policy": FixedPolicy(key_bits, value_bits),
        "statistic": NoStatistic(),
        "kind": TurboQuantMethod,
        "bits": (key_bits, value_bits),
    }


@cache
def lloyd_max(bits: int) -> torch.Tensor:
    """The 2^bits levels of the quantizer of N(0, 1) with the least mean squared error, float64, ascending."""
    levels = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    infinity = torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(_ROUNDS):
        edges = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
        density, below = torch.exp(-0.5 * edges**2) / (2 * torch.pi) ** 0.5, torch.special.ndtr(edges)
        moved = (density[:-1] - density[1:]) / below.diff()
        if float((moved - levels).abs().max()) < 1e-12:
            break
        levels = moved
    return levels


@dataclass(frozen=True)
class TurboQuantMethod(Method):
    """A method whose rows are indices.

    Attributes:
        bits: of a key's numbers and of a value's.
    """

    bits: tuple[int, int] = (4, 4)

    def prepare(
        self, quantizer: Quantizer, originals: torch.Tensor, start: int, overwrite: bool = False
    ) -> tuple[Pair, Pair, tuple[Outliers | None, Outliers | None]]:
        (keys, values), metas, _ = super().prepare(quantizer, originals, start, overwrite)
        key_index, norms = quantized_keys(keys, self.bits[KEY])
        value_index, ranges = quantized_values(values, self.bits[VALUE])
        rows = packable(key_index, self.bits[KEY]), packable(value_index, self.bits[VALUE])
        return rows, metas, (norms, ranges)


@dataclass(frozen=True)
class KeyNorms(IndexParameters):
    """Norms of keys over those of their rounded directions: `value` [layers, kv_heads, tokens, 1]; `index` is empty."""

    def restore(self, index: torch.Tensor, layer: int, first: int) -> None:
        levels = lloyd_max(self.bits).float().to(index.device)
        scale = self.of_tokens("value", layer, first, index.shape[1])
        index.copy_(levels[index.long()] * scale)


@dataclass(frozen=True)
class ValueRanges(IndexParameters):
    """Minima (`index`) and steps (`value`) of values, [layers, kv_heads, tokens, 1]."""

    def restore(self, index: torch.Tensor, layer: int, first: int) -> None:
        low, step = (self.of_tokens(name, layer, first, index.shape[1]) for name in ("index", "value"))
        index.mul_(step).add_(low)


def quantized_keys(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, KeyNorms]:
    """Indices, float32, of rotated keys [layers, kv_heads, tokens, head_dim], and their norms."""
    norms = rows.norm(dim=-1, keepdim=True)
    levels = lloyd_max(bits).float().to(rows.device)
    units = rows * (rows.shape[-1] ** 0.5 / norms.clamp_min(1e-20))
    index = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    corrected = half(norms / levels[index].norm(dim=-1, keepdim=True))
    return index.float(), KeyNorms(corrected[..., :0].clone(), corrected, "token", bits)


def quantized_values(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, ValueRanges]:
    """Indices, float32, of values [layers, kv_heads, tokens, head_dim], and their ranges."""
    low, top = rows.amin(-1, keepdim=True), 2**bits - 1
    step = ((rows.amax(-1, keepdim=True) - low) / top).clamp_min(1e-8)
    index = ((rows - low) / step).round_().clamp_(0, top)
    return index, ValueRanges(half(low), half(step), "token", bits)
