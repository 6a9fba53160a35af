"""What the library is told of the layers it attends in: the structures of csrc/attention.h.

Where packed tokens lie changes only when some come or change their width. So a sequence's are described once for
all layers, as numpy records of the C structures, and the description is kept until then.
"""

from __future__ import annotations

from ctypes import Structure, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from qaq_core.base.widths import WIDTHS
from qaq_core.kernels.rotation import NativeRotation
from qaq_core.quantization.codecs import Codec
from qaq_core.quantization.transforms import LinearTransform
from qaq_core.storage import packed as packed_rows
from qaq_core.storage.packed import PackedTokens

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
REDUCTIONS = {"max": 1, "mean_square": 2}
_AHEAD = 64
"""Scores of means are made for so many positions at a time."""


class _Pool(Structure):
    _fields_ = [("base", c_void_p), ("first", c_void_p)]


class _Side(Structure):
    _fields_ = [
        ("residual", c_void_p),
        ("residual_head_stride", c_int64),
        ("rows", c_void_p),
        ("order", c_void_p),
        ("split", c_int32),
        ("parts", c_int32),
        ("meta", c_void_p),
        ("scales", c_void_p),
        ("scale", c_void_p),
        ("offset", c_void_p),
        ("affine_head_stride", c_int64),
        ("rotation", NativeRotation),
    ]


class _Layer(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("kv_heads", "group", "dim", "sinks", "recent", "packed", "block_tokens")),
        *((name, c_int32) for name in ("start", "first", "residual_type", "reduction")),
        ("query", c_void_p),
        ("transformed", c_void_p),
        ("stride", c_int64),
        *((name, c_void_p) for name in ("key_mean", "value_mean", "angles", "tags")),
        ("tags_head_stride", c_int64),
        ("levels", c_void_p),
        ("key", _Side),
        ("value", _Side),
        *((name, c_void_p) for name in ("out_residual", "out_packed")),
        ("observed", c_void_p),
    ]


LAYER, _POOL = np.dtype(_Layer), np.dtype(_Pool)
SIDES = ("key", "value")


@dataclass(frozen=True)
class Description:
    """The packed tokens of one sequence as they were at some version.

    Attributes:
        layers: records of LAYER [layers]; what is not about packed tokens is 0.
        alive: what the records point into and the packed tokens do not hold themselves.
    """

    version: int
    layers: np.ndarray
    alive: list[object]


class Describer:
    """Describes packed tokens of one codec.

    Attributes:
        looks_up: whether a row's scales are looked up by its one meta byte. If not, they are passed as numbers,
            see `with_scales`.
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
        """All layers of a sequence's packed tokens, of which there must be some."""
        known = self._known.get(packed)
        if known is None or known.version != packed.version:
            known = self._known[packed] = self._describe(packed)
        return known

    def nothing(self, layers: int) -> np.ndarray:
        """Records of as many layers without packed tokens."""
        records = np.zeros(layers, LAYER)
        records["levels"] = self._levels.data_ptr()
        return records

    def with_scales(self, record: Any, packed: PackedTokens, layer: int) -> tuple[object, ...]:
        """Gives a layer's record the scales and offsets of its rows; returns what must live as long as it."""
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
        records["block_tokens"] = packed_rows.BLOCK_TOKENS
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
        """Says where one side's rows and meta bytes lie, in every layer; returns what must live as long."""
        mine = packed.sides[index]
        bases = np.zeros((len(mine.pools), len(WIDTHS)), np.uintp)
        rows = np.zeros((packed.layers, len(mine.pools)), _POOL)
        for block, pool in enumerate(mine.pools):
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
    """Where table[0], table[1], … begin."""
    step = table.stride(0) * table.itemsize
    return np.uintp(table.data_ptr()) + np.arange(len(table), dtype=np.uintp) * np.uintp(step)
