"""Quantization: originals become rows of a transform, rows become codes, codes become bit planes."""

from qaq_core.quantization.adaptation import Adaptation
from qaq_core.quantization.codecs import (
    Codec,
    GaussianCodec,
    GroupedCodec,
    NormalCodec,
    ProgressiveCodec,
    UniformCodec,
    make_codec,
)
from qaq_core.quantization.encoder import Encoder, MakeEncoder, TorchEncoder
from qaq_core.quantization.outliers import Outliers, split_outliers
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform, LinearTransform, Rotation, Transform

__all__ = [
    "Adaptation",
    "Codec",
    "Encoder",
    "GaussianCodec",
    "GroupedCodec",
    "IdentityTransform",
    "LinearTransform",
    "MakeEncoder",
    "NormalCodec",
    "Outliers",
    "ProgressiveCodec",
    "Quantizer",
    "Rotation",
    "TorchEncoder",
    "Transform",
    "UniformCodec",
    "make_codec",
    "split_outliers",
]
