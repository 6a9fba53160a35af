"""The C++ library, and what calls it. `csrc/` has the sources."""

from qaq_core.kernels.allocate import NativeAllocator
from qaq_core.kernels.decode import DecodeStep
from qaq_core.kernels.encode import NativeEncoder
from qaq_core.kernels.layers import LAYER, REDUCTIONS, SIDES, TYPES, Describer, addresses
from qaq_core.kernels.library import INTERFACE, load_library, missing_library
from qaq_core.kernels.repack import NativeRepacker

__all__ = [
    "INTERFACE",
    "LAYER",
    "REDUCTIONS",
    "SIDES",
    "TYPES",
    "DecodeStep",
    "Describer",
    "NativeAllocator",
    "NativeEncoder",
    "NativeRepacker",
    "addresses",
    "load_library",
    "missing_library",
]
