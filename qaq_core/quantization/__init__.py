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
from qaq_core.quantization.codecs.progressive import greedy_order
from qaq_core.quantization.encoder import Encoder, MakeEncoder, TorchEncoder, torch_encoder
from qaq_core.quantization.outliers import Outliers, split_outliers
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform, LinearTransform, Rotation, Transform
from qaq_core.quantization.transforms.hadamard import hadamard

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
    "greedy_order",
    "hadamard",
    "make_codec",
    "split_outliers",
    "torch_encoder",
]
