"""What the library is told of a sequence's own axes: the structure of csrc/axes.h."""

from ctypes import Structure, c_void_p


class NativeAxes(Structure):
    _fields_ = [(name, c_void_p) for name in ("reflections", "before", "after")]
