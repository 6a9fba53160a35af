"""The C++ library and its callers; README.md is a map of the sources."""

from qaq_core.kernels.allocate import NativeAllocator
from qaq_core.kernels.choice import KERNELS, kernel_name, make_encoder, native_library
from qaq_core.kernels.encode import NativeEncoder
from qaq_core.kernels.layers import LAYER, REDUCTIONS, SIDES, Describer, addresses
from qaq_core.kernels.library import checked, load_library, missing_library
from qaq_core.kernels.repack import NativeRepacker
from qaq_core.kernels.step_error import NativeStepErrors
from qaq_core.kernels.structures import INTERFACE, TYPES, DecodeStep, Prompt

__all__ = [
    "INTERFACE",
    "KERNELS",
    "LAYER",
    "REDUCTIONS",
    "SIDES",
    "TYPES",
    "DecodeStep",
    "Describer",
    "NativeAllocator",
    "NativeEncoder",
    "NativeRepacker",
    "NativeStepErrors",
    "Prompt",
    "addresses",
    "checked",
    "kernel_name",
    "load_library",
    "make_encoder",
    "missing_library",
    "native_library",
]
