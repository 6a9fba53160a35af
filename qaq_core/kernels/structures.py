"""The structures of the C interface (csrc/*.h), as ctypes declares them.

They are declared here once; numpy's records are made of them. When the library is loaded, `difference` compares every
field with the library's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p, sizeof
from typing import Any

import torch

INTERFACE = 20
"""QAQ_INTERFACE of csrc/interface.h: changes with a function's arguments or a field's meaning."""


TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""QaqType of csrc/interface.h."""


def _fields(kind: Any, names: str) -> Iterator[tuple[str, Any]]:
    return ((name, kind) for name in names.split())


class Pool(Structure):
    """QaqPool of csrc/attention.h."""

    _fields_ = [*_fields(c_void_p, "base first")]


class NativeRotation(Structure):
    """QaqRotation of csrc/rotation.h."""

    _fields_ = [*_fields(c_void_p, "reflections before after")]


class Side(Structure):
    """QaqSide of csrc/attention.h."""

    _fields_ = [
        ("residual", c_void_p),
        ("residual_head_stride", c_int64),
        *_fields(c_void_p, "rows order"),
        *_fields(c_int32, "split parts"),
        *_fields(c_void_p, "meta scales scale offset"),
        ("affine_head_stride", c_int64),
        ("rotation", NativeRotation),
    ]


class Layer(Structure):
    """QaqLayer of csrc/attention.h."""

    _fields_ = [
        *_fields(c_int32, "kv_heads group dim sinks recent packed block_tokens blocks"),
        *_fields(c_int32, "start first residual_type reduction"),
        *_fields(c_void_p, "query transformed"),
        ("stride", c_int64),
        *_fields(c_void_p, "key_mean value_mean angles tags"),
        ("tags_head_stride", c_int64),
        ("levels", c_void_p),
        *_fields(Side, "key value"),
        *_fields(c_void_p, "out_residual out_packed observed log_sums"),
    ]


class DecodeStep(Structure):
    """QaqDecode of csrc/decode.h."""

    _fields_ = [
        ("type", c_int32),
        *_fields(c_void_p, "query key value"),
        ("scaling", c_float),
        *_fields(c_void_p, "query_map output_map originals scratch out"),
    ]


class Prompt(Structure):
    """QaqPrompt of csrc/prompt.h."""

    _fields_ = [
        *_fields(c_int32, "type queries window distance summed"),
        ("scaling", c_float),
        ("query", c_void_p),
        *_fields(c_int64, "head_stride query_stride"),
        *_fields(c_void_p, "query_map output_map sums peaks"),
        ("observed_stride", c_int64),
        ("out", c_void_p),
    ]


class Span(Structure):
    """QaqSpan of csrc/encode.h."""

    _fields_ = [("base", c_void_p), *_fields(c_int64, "layers heads tokens"), ("strides", c_int64 * 3)]


class TransformTables(Structure):
    """QaqTransform of csrc/encode.h."""

    _fields_ = [
        *_fields(c_int32, "layers kv_heads dim kinds"),
        *_fields(c_void_p, "matrices means angles"),
        ("angles_stride", c_int64),
        ("kind", c_void_p),
        ("rotation", NativeRotation),
    ]


class CellTables(Structure):
    """QaqCells of csrc/encode.h."""

    _fields_ = [
        *_fields(c_int32, "dim split"),
        *_fields(c_void_p, "edges below"),
        *_fields(c_float, "low bins_per_unit"),
        ("bins", c_int32),
        ("units", c_void_p),
    ]


class Encode(Structure):
    """QaqEncode of csrc/encode.h."""

    _fields_ = [
        ("cells", CellTables),
        ("rows", Span),
        ("scales", c_void_p),
        ("scale_count", c_int64),
        *_fields(c_void_p, "offset have want begin out"),
        ("out_bytes", c_int64),
    ]


class Weigh(Structure):
    """QaqWeigh of csrc/allocate.h."""

    _fields_ = [
        *_fields(c_int32, "heads tokens first count sinks reach"),
        *_fields(c_float, "own before share floor"),
        ("state", c_void_p),
        ("state_stride", c_int64),
        *_fields(c_void_p, "importance sums smooth weight"),
    ]


class SideRows(Structure):
    """QaqSideRows of csrc/allocate.h."""

    _fields_ = [
        *_fields(c_int32, "heads count"),
        *_fields(c_void_p, "weight meta"),
        ("meta_stride", c_int64),
        *_fields(c_void_p, "thresholds tags"),
        ("tags_stride", c_int64),
        ("shift", c_int32),
    ]


class StatisticUpdate(Structure):
    """QaqStatisticUpdate of csrc/allocate.h."""

    _fields_ = [
        *_fields(c_int32, "heads tokens"),
        ("state", c_void_p),
        ("state_stride", c_int64),
        *_fields(c_void_p, "importance observed"),
        *_fields(c_float, "keep log2_floor step"),
        ("seed", c_int64),
    ]


class StepError(Structure):
    """QaqStepError of csrc/step_error.h."""

    _fields_ = [
        *_fields(c_int32, "heads tokens"),
        ("observed", c_void_p),
        ("observed_stride", c_int64),
        *_fields(c_void_p, "factors tags"),
        ("tags_stride", c_int64),
        *_fields(c_void_p, "key_meta value_meta"),
        ("meta_stride", c_int64),
        *_fields(c_void_p, "key_lost value_lost"),
        *_fields(c_float, "negligible least"),
        ("room", c_int64),
        *_fields(c_void_p, "index error total"),
    ]


class Repack(Structure):
    """QaqRepack of csrc/repack.h."""

    _fields_ = [
        *_fields(c_int32, "heads before after half_bit shift"),
        ("tags_before", c_void_p),
        ("before_stride", c_int64),
        ("tags_after", c_void_p),
        ("after_stride", c_int64),
        *_fields(c_void_p, "held held_rows rows room"),
        ("moves", c_int64),
        *_fields(c_void_p, "index keep planes"),
        ("plane_bytes", c_int64),
        ("offsets", c_void_p),
    ]


class Narrow(Structure):
    """QaqNarrow of csrc/repack.h."""

    _fields_ = [
        *_fields(c_int32, "heads tokens half_bit shift"),
        ("before", c_void_p),
        ("before_stride", c_int64),
        ("after", c_void_p),
        ("after_stride", c_int64),
        *_fields(c_void_p, "held held_rows rows room"),
    ]


class Weights(Structure):
    """QaqWeights of csrc/dense.h."""

    _fields_ = [*_fields(c_void_p, "weight bias"), ("outputs", c_int64)]


class Heads(Structure):
    """QaqHeads of csrc/dense.h."""

    _fields_ = [
        *_fields(c_int32, "rows query_heads kv_heads dim"),
        *_fields(c_void_p, "joint query_norm key_norm"),
        ("epsilon", c_float),
        *_fields(c_void_p, "cos sin query key value"),
    ]


STRUCTURES: dict[str, type[Structure]] = {
    "QaqPool": Pool,
    "QaqRotation": NativeRotation,
    "QaqSide": Side,
    "QaqLayer": Layer,
    "QaqDecode": DecodeStep,
    "QaqPrompt": Prompt,
    "QaqSpan": Span,
    "QaqTransform": TransformTables,
    "QaqCells": CellTables,
    "QaqEncode": Encode,
    "QaqWeigh": Weigh,
    "QaqSideRows": SideRows,
    "QaqStatisticUpdate": StatisticUpdate,
    "QaqStepError": StepError,
    "QaqRepack": Repack,
    "QaqNarrow": Narrow,
    "QaqWeights": Weights,
    "QaqHeads": Heads,
}

Layout = dict[str, tuple[int, int]]
"""Offset and size in bytes of each field, as "structure.field", and of each structure."""


class _Field(Structure):
    """QaqField of csrc/interface.h."""

    _fields_ = [*_fields(c_char_p, "structure name"), *_fields(c_int64, "offset size")]


def declared(structures: Mapping[str, type[Structure]] = STRUCTURES) -> Layout:
    """The layout that ctypes gives the structures."""
    found: Layout = {}
    for name, structure in structures.items():
        found[name] = (0, sizeof(structure))
        for field, *_ in structure._fields_:
            place = getattr(structure, field)
            found[f"{name}.{field}"] = (place.offset, place.size)
    return found


def compiled(library: Any) -> Layout:
    """The layout that the C++ compiler gave the structures."""
    library.qaq_fields.restype = POINTER(_Field)
    fields, found, i = library.qaq_fields(), {}, 0
    while (structure := fields[i].structure) is not None:
        name = b".".join(part for part in (structure, fields[i].name) if part).decode()
        found[name] = (int(fields[i].offset), int(fields[i].size))
        i += 1
    return found


def difference(ours: Layout, theirs: Layout) -> str | None:
    """The first field in which the library's layout differs from the declared one; None if they are equal."""
    for name in {**ours, **theirs}:
        mine, built = ours.get(name), theirs.get(name)
        if mine != built:
            return f"{name} is {_say(built)} in the library, {_say(mine)} in Python"
    return None


def _say(place: tuple[int, int] | None) -> str:
    return "missing" if place is None else f"{place[1]} bytes at offset {place[0]}"
