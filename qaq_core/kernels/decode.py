"""What the library is told of a decode step: the structure of csrc/decode.h."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_void_p


class DecodeStep(Structure):
    """QaqDecode of csrc/decode.h."""

    _fields_ = [
        ("type", c_int32),
        *((name, c_void_p) for name in ("query", "key", "value")),
        ("scaling", c_float),
        *((name, c_void_p) for name in ("query_map", "output_map", "originals", "scratch", "out")),
    ]
