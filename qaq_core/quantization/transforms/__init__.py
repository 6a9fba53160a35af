"""Transforms: the coordinates in which rows are quantized. One file per transform or part of one."""

from qaq_core.quantization.transforms.base import Transform
from qaq_core.quantization.transforms.identity import IdentityTransform
from qaq_core.quantization.transforms.linear import LinearTransform
from qaq_core.quantization.transforms.rotation import Rotation

__all__ = ["IdentityTransform", "LinearTransform", "Rotation", "Transform"]
