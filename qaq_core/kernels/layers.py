"""Describes a sequence's packed tokens to the library, in the structures of csrc/attention.h.

Their addresses change only when tokens are added or change width. So all layers are described once, as numpy records of
the C structures, and the description is kept until then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from qaq_core.base.widths import WIDTHS
from qaq_core.kernels.structures import Layer, Pool
from qaq_core.quantization.codecs import Codec
from qaq_core.quantization.transforms import LinearTransform
from qaq_core.storage import packed as packed_rows
from qaq_core.storage.packed import PackedTokens
from qaq_core.storage.pool import Pool as RowPool

REDUCTIONS = {"max": 1, "mean_square": 2}
_AHEAD = 64
"""The library reads angles of up to this many positions after the last packed token."""


LAYER, _POOL = np.dtype(Layer), np.dtype(Pool)
SIDES = ("key", "value")


@dataclass(frozen=True)
class Description:
    """The packed tokens of one sequence at one version.

    Attributes:
        layers: records of LAYER [layers]; fields that are not about packed tokens are 0.
        alive: objects that the records point into and that the packed tokens do not hold.
    """

    version: int
    layers: np.ndarray
    alive: list[object]


class Describer:
    """Describes packed tokens of one codec.

    Attributes:
        looks_up: whether the library looks up a row's scales by its one meta byte. If not, they are passed as
            numbers, see `with_scales`.
    """

    def __init__(self, codec: Codec) -> None:
        self._levels = torch.zeros(9, 256)
        for bits in range(1, 9):
            self._levels[bits, : 1 << bits] = codec.levels(bits)
        self.looks_up = codec.meta_bytes == 1
        self._scales = torch.empty(0, 0)
        if self.looks_up:
            self._scales = codec.affine(torch.arange(256, dtype=torch.uint8).unsqueeze(-1))[0].contiguous()
        self._known: WeakKeyDictionary[PackedTokens, Description] = WeakKeyDictionary()

    def packed(self, packed: PackedTokens) -> Description:
        """Describes all layers of a sequence that has packed tokens."""
        known = self._known.get(packed)
        if known is None or known.version != packed.version:
            known = self._known[packed] = self._describe(packed)
        return known

    def nothing(self, layers: int) -> np.ndarray:
        """Records of layers without packed tokens."""
        records = np.zeros(layers, LAYER)
        records["levels"] = self._levels.data_ptr()
        return records

    def with_scales(self, record: Any, packed: PackedTokens, layer: int) -> tuple[object, ...]:
        """Writes the scales and offsets of a layer's rows to its record; returns what must live as long."""
        alive: list[object] = []
        for index, side in enumerate(SIDES):
            scale, offset = packed.affine(index, layer, 0, len(packed))
            scale, offset = scale.contiguous(), None if offset is None else offset.contiguous()
            mine = record[side]
            mine["scale"], mine["offset"] = scale.data_ptr(), 0 if offset is None else offset.data_ptr()
            mine["parts"] = scale.shape[2]
            mine["affine_head_stride"] = scale.shape[1] if scale.shape[0] > 1 else 0
            alive += [scale, offset]
        return tuple(alive)

    def _describe(self, packed: PackedTokens) -> Description:
        records = self.nothing(packed.layers)
        alive: list[object] = []
        records["packed"], records["start"] = len(packed), packed.start
        records["block_tokens"], records["blocks"] = packed_rows.BLOCK_TOKENS, len(packed.sides[0].pools)
        records["tags"] = addresses(packed.tags)
        records["tags_head_stride"] = packed.tags.stride(1)
        transform = packed.quantizer.transform
        for layer, record in enumerate(records):
            center, shift = transform.center(layer, packed.stop + _AHEAD), transform.value_center(layer)
            if center is not None:
                record["key_mean"], record["angles"] = center[0].data_ptr(), center[1].data_ptr()
            if shift is not None:
                record["value_mean"] = shift.data_ptr()
            alive += [center, shift]
        alive += [self._fill(records[side], index, packed) for index, side in enumerate(SIDES)]
        if isinstance(transform, LinearTransform) and transform.rotation is not None:
            for side, rotation in zip(SIDES, transform.rotation, strict=True):
                for name, part in vars(rotation).items():
                    records[side]["rotation"][name] = addresses(part)
                alive.append(rotation)
        return Description(packed.version, records, alive)

    def _fill(self, side: Any, index: int, packed: PackedTokens) -> tuple[object, ...]:
        """Writes the addresses of one side's rows and meta bytes in every layer; returns what must live as long."""
        mine = packed.sides[index]
        bases = np.zeros((len(mine.pools), len(WIDTHS)), np.uintp)
        rows = np.zeros((packed.layers, len(mine.pools)), _POOL)
        for block, pool in enumerate(mine.pools):
            assert isinstance(pool, RowPool)
            for width, held in pool.rows.items():
                bases[block, WIDTHS.index(width)] = held.data_ptr()
            rows["first"][:, block] = addresses(pool.first)
        rows["base"] = bases.ctypes.data + np.arange(len(bases), dtype=np.uintp) * np.uintp(bases.strides[0])
        side["rows"] = rows.ctypes.data + np.arange(len(rows), dtype=np.uintp) * np.uintp(rows.strides[0])
        order = packed.quantizer.layout(index, packed.head_dim).order
        side["order"], side["split"] = order.data_ptr(), packed.quantizer.codec.split or packed.head_dim // 8
        if self.looks_up:
            meta = mine.meta
            side["meta"] = addresses(meta.expand(packed.layers, -1, -1, -1))
            side["scales"], side["parts"] = self._scales.data_ptr(), self._scales.shape[1]
            side["affine_head_stride"] = meta.stride(1) if meta.shape[1] > 1 else 0
        return bases, rows, order


def addresses(table: torch.Tensor) -> np.ndarray:
    """Addresses of table[0], table[1], …"""
    step = table.stride(0) * table.itemsize
    return np.uintp(table.data_ptr()) + np.arange(len(table), dtype=np.uintp) * np.uintp(step)
