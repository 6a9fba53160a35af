"""Methods whose attention and pools are those of CUDA kernels, emulated, while all else is torch's."""

from __future__ import annotations

from qaq_core.attention import CudaAttention
from qaq_core.cache import backends
from qaq_core.cache.method import Method
from qaq_core.kernels.cuda.emulation import Emulation


def emulate(method: Method) -> None:
    """Changes a method that has no sequences yet. It may be of a pretended device that gives addresses."""
    attention = CudaAttention(method.quantizer.codec, method.device, Emulation())
    repacker = backends.make_repacker(method.device, "reference", attention, method.shape)
    quantizer = method.quantizer.using(backends.make_encoders(method.device, "reference", attention))
    for name, part in (("attention", attention), ("repacker", repacker), ("quantizer", quantizer)):
        object.__setattr__(method, name, part)
