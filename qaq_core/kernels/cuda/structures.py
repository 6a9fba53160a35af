"""The structures of structures.h, field by field; kernels are given them by value or in device memory."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_longlong, c_void_p

import torch

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
REDUCTIONS = {"max": 1, "mean_square": 2}
HEAD_DIMS = (64, 96, 128, 256)
MOST_GROUP = 16
"""Query heads of a KV head."""
QUAD = 4
"""Query heads that a block of threads takes."""
NEAR = 64
DEEPER = 6
POOLS = 2
TILE = 32


class Turn(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("vectors", "factors", "before", "after"))


class Sequence(ctypes.Structure):
    _fields_ = (
        ("tags", c_void_p),
        ("meta", c_void_p * 2),
        ("runs", c_void_p),
        ("exact", c_void_p * 2),
        *((name, c_void_p) for name in ("key_mean", "value_mean")),
        ("turns", Turn * 2),
        ("tag_stride", c_longlong),
        ("meta_stride", c_longlong * 2),
        ("exact_stride", c_longlong * 2),
        *((name, c_int) for name in ("tokens", "blocks", "start", "unused")),
    )


class Step(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("layers", "originals", "scores", "statistic", "log_sums")),
        *((name, c_int) for name in ("sinks", "exact_tokens", "ring", "ring_first", "new_place", "reduction")),
    )


class Layout(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            *("units", "planes", "deepest", "pools", "levels", "scales", "angles", "near", "query_map", "output_map"),
        )
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("steps", c_void_p),
        *((name, c_int) for name in ("layer", "batch", "heads", "group", "quads", "splits", "dtype", "window")),
        ("scaling", c_float),
    )


class PrepareArgs(ctypes.Structure):
    _fields_ = (
        ("batch", Batch),
        ("layout", Layout),
        ("query", c_void_p),
        ("added", c_void_p * 2),
        ("dtype", c_int),
        *((name, c_void_p) for name in ("asked", "framed", "fragments", "turned", "factors")),
    )


class SplitArgs(ctypes.Structure):
    _fields_ = (
        ("batch", Batch),
        ("layout", Layout),
        *((name, c_void_p) for name in ("framed", "fragments", "turned", "factors", "sums", "norms")),
    )


class MergeArgs(ctypes.Structure):
    _fields_ = (
        ("batch", Batch),
        ("layout", Layout),
        *((name, c_void_p) for name in ("asked", "sums", "norms", "out")),
        ("out_dtype", c_int),
        ("totals", c_void_p),
    )


class ObserveArgs(ctypes.Structure):
    _fields_ = (("batch", Batch), ("totals", c_void_p))


class RotateArgs(ctypes.Structure):
    _fields_ = (*((name, c_void_p) for name in ("rows", "vectors", "before", "after")), ("tokens", c_int))


class EncodeArgs(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("rows", "meta", "have", "want", "begin", "out", "edges", "scales", "places")),
        *((name, c_int) for name in ("count", "split")),
    )


class WeaveArgs(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("before", "after", "origin", "from_places", "to", "to_places")),
        *((name, c_void_p) for name in ("keep", "offsets", "planes")),
        *((name, c_longlong) for name in ("before_stride", "after_stride")),
        *((name, c_int) for name in ("before_tokens", "after_tokens", "before_blocks", "after_blocks")),
        *((name, c_int) for name in ("side", "unit", "tiled")),
    )
