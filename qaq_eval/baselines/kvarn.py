"""KVarN (arXiv 2606.03458): keys and values normalized on both axes of a tile, `kvarn-k4v2` as its authors ship it.

A tile is one head's vectors of 128 tokens. Keys and values are rotated by a Hadamard matrix. Then standard deviations
of the tile's columns and rows are divided out in turn, 8 times, in the logarithm, and the scales that left the tile
most even are kept. What is left is rounded to 2^b levels from the minimum to the maximum of each row, both included. A
row is a channel of keys and a token of values. With s for the scales that were divided out, in half precision:

    key    k = (i·a + z)·s_token       a, z of each channel, s of each token
    value  v = (i·a + z)·s_channel     a, z of each token, s of each channel

So a tile of keys has 2·head_dim + 128 numbers beside its codes, one of values head_dim + 2·128. The number of rounds
is the default of the authors' vLLM fork; the bounds of deviations (10^-3 to 10^3) and of the logarithms of scales (-0.3
to 10), and the measure of evenness (largest over smallest deviation, of columns plus of rows), are those of its
kernels' published reference. Its 128 sink tokens are 4 here, as for all methods. Tiles are never partly filled, so
128 to 255 recent tokens are exact: compare it with others under the same residual window (`--window 128`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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

NAME, PATTERN, TAKES_TARGET = "kvarn-k<bits>v<bits>", r"kvarn-k(\d)v(\d)", False
TILE = 128
"""Tokens of a tile."""

ROUNDS = 8
DEVIATIONS = (1e-3, 1e3)
LOG_SCALES = (-0.3, 10.0)


def preset(model: Any, shape: ModelShape, target: Target, key_bits: int, value_bits: int) -> dict[str, Any]:
    if not (1 <= key_bits <= 8 and 1 <= value_bits <= 8):
        raise ConfigError(f"kvarn takes 1 to 8 bits, not {key_bits}/{value_bits}")
    rotation = hadamard(shape.head_dim)
    return {
        "quantizer": Quantizer(linear(model, shape, rotation, rotation), IndexCodec()),
        "policy": FixedPolicy(key_bits, value_bits),
        "statistic": NoStatistic(),
        "pack_tokens": TILE,
        "kind": KVarNMethod,
        "bits": (key_bits, value_bits),
    }


@dataclass(frozen=True)
class KVarNMethod(Method):
    """A method that packs whole tiles.

    Attributes:
        bits: of a key's numbers and of a value's.
    """

    bits: tuple[int, int] = (4, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pack_tokens % TILE:
            raise ConfigError(f"kvarn packs tiles of {TILE} tokens: the residual window must be a multiple of that")

    def prepare(
        self, quantizer: Quantizer, originals: torch.Tensor, start: int, overwrite: bool = False
    ) -> tuple[Pair, Pair, tuple[Outliers | None, Outliers | None]]:
        rows, metas, _ = super().prepare(quantizer, originals, start, overwrite)
        (keys, key_scales), (values, value_scales) = (
            quantized(side, rows[side], self.bits[side]) for side in (KEY, VALUE)
        )
        return (packable(keys, self.bits[KEY]), packable(values, self.bits[VALUE])), metas, (key_scales, value_scales)


@dataclass(frozen=True)
class TileScales(IndexParameters):
    """Scales of tiles: z (`index`), a (`value`) and s (`across`) of the module's formulas.

    [layers, kv_heads, tiles, head_dim] where there is one number for each channel, [layers, kv_heads, tokens, 1] where
    there is one for each token.
    """

    across: torch.Tensor

    def restore(self, index: torch.Tensor, layer: int, first: int) -> None:
        offset, scale, across = (
            self.of_tokens(name, layer, first, index.shape[1]) for name in ("index", "value", "across")
        )
        index.mul_(scale).add_(offset).mul_(across)


class KeyScales(TileScales):
    TOKENS: ClassVar[dict[str, int]] = {"index": TILE, "value": TILE, "across": 1}


class ValueScales(TileScales):
    TOKENS: ClassVar[dict[str, int]] = {"index": 1, "value": 1, "across": TILE}


def quantized(side: int, rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, TileScales]:
    """Indices, float32, of rotated rows [layers, kv_heads, tokens, head_dim] in whole tiles, and their scales."""
    index, parts = torch.empty_like(rows), []
    for layer, own in enumerate(rows):  # a layer at a time: the tiles' copies take memory
        tiles = own.unflatten(1, (-1, TILE))  # [kv_heads, tiles, tokens, head_dim]
        tiles = tiles.mT if side == KEY else tiles
        along, across = even_scales(tiles)
        even = tiles / along / across
        low = even.amin(-1, keepdim=True)
        step = ((even.amax(-1, keepdim=True) - low) / (2**bits - 1)).clamp_min(1e-10)
        codes = ((even - low) / step).round_().clamp_(0, 2**bits - 1)
        index[layer] = (codes.mT if side == KEY else codes).flatten(1, 2)
        parts.append((half(low * along), half(step * along), half(across)))
    low, step, across = (torch.stack(part) for part in zip(*parts, strict=True))
    by_token = (2, 3)  # tiles and their tokens, as one dim
    if side == KEY:
        scales = low.squeeze(-1), step.squeeze(-1), across.squeeze(-2).flatten(*by_token).unsqueeze(-1)
        return index, KeyScales(scales[0], scales[1], "channel", bits, scales[2])
    scales = low.flatten(*by_token), step.flatten(*by_token), across.squeeze(-2)
    return index, ValueScales(scales[0], scales[1], "token", bits, scales[2])


def even_scales(tiles: torch.Tensor, rounds: int = ROUNDS) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows and columns of tiles [.., rows, columns] are divided by, so that their deviations are alike.

    Returns:
        float32 [.., rows, 1] and [.., 1, columns].
    """
    logs = [torch.zeros_like(tiles[..., :1]), torch.zeros_like(tiles[..., :1, :])]
    best, even = [log.clone() for log in logs], tiles
    least = unevenness(even)
    for _ in range(rounds):
        for which, dim in ((1, -2), (0, -1)):  # columns first
            deviation = even.std(dim, keepdim=True).clamp(*DEVIATIONS)
            logs[which] = (logs[which] + deviation.log()).clamp(*LOG_SCALES)
            even = tiles / logs[0].exp() / logs[1].exp()
        found = unevenness(even)
        better = found <= least
        best = [torch.where(better, new, old) for new, old in zip(logs, best, strict=True)]
        least = torch.where(better, found, least)
    return best[0].exp(), best[1].exp()


def unevenness(tiles: torch.Tensor) -> torch.Tensor:
    """Largest over smallest deviation, of columns plus of rows: [.., 1, 1]; 2 for a tile that is even."""
    total = torch.zeros_like(tiles[..., :1, :1])
    for dim in (-2, -1):
        deviation = tiles.std(dim, keepdim=True)
        total += deviation.amax((-2, -1), keepdim=True) / deviation.amin((-2, -1), keepdim=True).clamp_min(1e-8)
    return total
