"""What the library is told of a sequence's own axes: the structure of csrc/rotation.h."""

from ctypes import Structure, c_void_p


class NativeRotation(Structure):
    _fields_ = [(name, c_void_p) for name in ("reflections", "before", "after")]
