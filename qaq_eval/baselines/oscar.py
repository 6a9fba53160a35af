"""OSCAR (arXiv 2605.17757): 2-bit keys and values, rotated by what attention does with them, `oscar-2`.

The rotation of a layer's keys is R = U·H·P. U are the eigenvectors of the covariance of queries after RoPE,
C_K = mean over KV heads of E[q qᵀ]; H is a Hadamard matrix, which gives every coordinate the same share of the
directions that queries look along; P orders columns by eigenvalue with bits reversed, so that the groups of a long row
are alike. The values' rotation is made in the same way of C_V = mean over KV heads of E[w·v vᵀ], where a token's
weight is w ∝ kᵀ·E[q qᵀ]·k, normalized to a mean of 1. A rotated vector's numbers are clipped to the n-th smallest
magnitude of that vector, n being 0.96 (keys) and 0.92 (values) of head_dim, rounded down and counted from 0. They are
rounded to 4 levels from its minimum to its maximum, both included; scale and offset are in half precision. The formulas
of C_V and the clipping are those of the authors' code; their kernels store scales in float32 and count them as 16
bits, as is done here.

2.28 bits an element, the published figure, is 2 bits, 2 numbers of 16 bits for 128 elements, and 64 sinks with 256
recent tokens in 128K. Here a row is one group: 2.25 bits with a head_dim of 128, and 2.5 with 64. Sinks and recent
tokens are those of all methods. Their Lloyd–Max variant is not built.

Calibration: the same text that `balanced` is calibrated on, sampled by the model, where the authors use 20,000 to
30,000 tokens of GPQA. The first 4 tokens of each text are left out, since sinks are not quantized. Rotations are kept
in $QAQ_CACHE_DIR/oscar.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qaq_core import Method, Quantizer, Target
from qaq_core.allocation import FixedPolicy, NoStatistic
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.paths import cache_dir
from qaq_core.cache import Pair
from qaq_core.calibration import own_text
from qaq_core.models import ModelShape, left_fingerprint, weights_fingerprint
from qaq_core.quantization import Outliers, UniformCodec, hadamard
from qaq_eval.baselines.hadamard import linear

NAME, PATTERN, TAKES_TARGET = "oscar-2", r"oscar-(2)", False
SINKS = 4
log = logging.getLogger(__name__)


def preset(
    model: Any,
    shape: ModelShape,
    target: Target,
    bits: int,
    clip_keys: float = 0.96,
    clip_values: float = 0.92,
) -> dict[str, Any]:
    if not all(0 < share <= 1 for share in (clip_keys, clip_values)):
        raise ConfigError(f"oscar clips to a share over 0 and at most 1, not to {clip_keys} and {clip_values}")
    keys, values = rotations(model, shape)
    return {
        # A transform multiplies column vectors; the paper multiplies rows.
        "quantizer": Quantizer(linear(model, shape, keys.mT, values.mT), FullRangeCodec(bits)),
        "policy": FixedPolicy(bits, bits),
        "statistic": NoStatistic(),
        "kind": OscarMethod,
        "clip": (clip_keys, clip_values),
    }


class FullRangeCodec(UniformCodec):
    """2^b levels from a vector's minimum to its maximum, both included: `UniformCodec` of a range half a step wider.

    The codes have one width; unlike other codecs' codes they cannot be truncated to fewer bits.
    """

    name = "full-range"

    def __init__(self, bits: int) -> None:
        super().__init__("head")
        self.bits = bits

    def meta(self, rows: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
        low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        step = (high - low) / (2**self.bits - 1)
        return self._store(low - step / 2, step * 2**self.bits)

    def settings(self) -> dict[str, object]:
        return {"name": self.name, "bits": self.bits}


@dataclass(frozen=True)
class OscarMethod(Method):
    """A method that clips rows before they are quantized.

    Attributes:
        clip: of keys and of values, see the module.
    """

    clip: tuple[float, float] = (1.0, 1.0)

    def prepare(
        self, quantizer: Quantizer, originals: torch.Tensor, start: int, overwrite: bool = False
    ) -> tuple[Pair, Pair, tuple[Outliers | None, Outliers | None]]:
        rows, _, outliers = super().prepare(quantizer, originals, start, overwrite)
        keys, values = (clipped(rows[side], self.clip[side]) for side in (KEY, VALUE))
        return (keys, values), (quantizer.meta(keys), quantizer.meta(values)), outliers


def clipped(rows: torch.Tensor, share: float) -> torch.Tensor:
    """Rows [.., head_dim] with no number beyond the magnitude that a share of the row's numbers stays below."""
    dim = rows.shape[-1]
    most = rows.abs().kthvalue(min(int(share * dim), dim - 1) + 1, -1, keepdim=True).values
    return torch.maximum(torch.minimum(rows, most), -most)


def rotation(covariance: torch.Tensor) -> torch.Tensor:
    """U·H·P of a covariance [head_dim, head_dim], float64; head_dim is a power of two."""
    dim = len(covariance)
    if dim & (dim - 1):
        raise ConfigError(f"oscar needs a head_dim that is a power of two, not {dim}")
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance.double())
    signed = hadamard(dim)
    plain = signed * signed[:1].sign()  # without the random signs: the first row of a Hadamard matrix is positive
    digits = dim.bit_length() - 1
    reversed_bits = torch.tensor([int(f"{i:0{digits}b}"[::-1], 2) if digits else 0 for i in range(dim)])
    order = torch.empty(dim, dtype=torch.long)
    order[reversed_bits] = eigenvalues.argsort(descending=True)
    return (eigenvectors @ plain.to(eigenvectors.device))[:, order.to(eigenvectors.device)]


@torch.no_grad()
def rotations(model: Any, shape: ModelShape) -> tuple[torch.Tensor, torch.Tensor]:
    """R of keys and of values, float32 [layers, 1, head_dim, head_dim]: kept from before, or measured now."""
    path = cache_dir() / "oscar" / f"{left_fingerprint(model) or weights_fingerprint(model, shape)}.safetensors"
    if path.is_file():
        kept = load_file(path)
        return kept["keys"], kept["values"]
    log.warning("measuring OSCAR's rotations once, on text that the model samples itself; kept in %s", path)
    with QueryCovariances(model, shape) as queries:
        _, cache = own_text(model)
    found = []
    for layer, held in enumerate(cache.layers):
        keys, values = (side[:, :, SINKS:].transpose(0, 1).flatten(1, 2) for side in (held.keys, held.values))
        covariance = queries.of_layer(layer)
        found.append((rotation(covariance.mean(0)), rotation(value_covariance(covariance, keys, values))))
    keys, values = (torch.stack(side).float().unsqueeze(1).cpu() for side in zip(*found, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({"keys": keys.contiguous(), "values": values.contiguous()}, part)
    part.replace(path)
    return keys, values


def value_covariance(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """C_V of a layer, float64 [head_dim, head_dim].

    Args:
        queries: E[q qᵀ] float64 [kv_heads, head_dim, head_dim]. keys, values: [kv_heads, n, head_dim].
    """
    keys, values = keys.double(), values.double()
    weights = ((keys @ queries) * keys).sum(-1)
    weights = weights / weights.mean(-1, keepdim=True).clamp_min(1e-12)
    return ((values * weights.unsqueeze(-1)).mT @ values / keys.shape[1]).mean(0)


class QueryCovariances:
    """Sums q qᵀ of every KV head's queries, as attention sees them, while the model runs inside."""

    def __init__(self, model: Any, shape: ModelShape) -> None:
        self._model, self._shape = model, shape
        self._sums: list[Any] = [0.0] * shape.layers
        self._counts = [0] * shape.layers
        self._seen = [0] * shape.layers

    def of_layer(self, layer: int) -> torch.Tensor:
        """E[q qᵀ], float64 [kv_heads, head_dim, head_dim]."""
        mean: torch.Tensor = self._sums[layer] / self._counts[layer]
        return mean

    def __enter__(self) -> QueryCovariances:
        def watching(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._add(module.layer_idx, query)
            return sdpa_attention_forward(module, query, *args, **kwargs)

        self._was = self._model.config._attn_implementation
        AttentionInterface.register("qaq-oscar", watching)
        AttentionMaskInterface.register("qaq-oscar", sdpa_mask)
        self._model.set_attn_implementation("qaq-oscar")
        return self

    def __exit__(self, *exc: object) -> None:
        self._model.set_attn_implementation(self._was)

    def _add(self, layer: int, query: torch.Tensor) -> None:
        """Adds queries [sequences, query_heads, tokens, head_dim] of the next positions."""
        mine = query[:, :, max(0, SINKS - self._seen[layer]) :]
        self._seen[layer] += query.shape[2]
        grouped = mine.unflatten(1, (self._shape.kv_heads, -1)).transpose(0, 1).flatten(1, 3).double()
        self._sums[layer] = self._sums[layer] + grouped.mT @ grouped
        self._counts[layer] += grouped.shape[1]
