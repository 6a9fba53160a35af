"""Attention over packed tokens. One file per implementation."""

from qaq_core.attention.base import Attention, LayerInput
from qaq_core.attention.correction import BetterRows, correct
from qaq_core.attention.cpu import CpuAttention
from qaq_core.attention.cuda import CudaAttention
from qaq_core.attention.cuda import launcher as cuda_launcher
from qaq_core.attention.cuda import missing as cuda_missing
from qaq_core.attention.cuda_sequences import STEP, staged
from qaq_core.attention.cuda_step import StepKernels
from qaq_core.attention.cuda_tables import refused_codec
from qaq_core.attention.fallback import PROMPT
from qaq_core.attention.interface import use_qaq_attention
from qaq_core.attention.reference import LayerTokens, ReferenceAttention
from qaq_core.attention.triton import TritonAttention
from qaq_core.attention.triton import missing as triton_missing

__all__ = [
    "PROMPT",
    "STEP",
    "Attention",
    "BetterRows",
    "CpuAttention",
    "CudaAttention",
    "LayerInput",
    "LayerTokens",
    "ReferenceAttention",
    "StepKernels",
    "TritonAttention",
    "correct",
    "cuda_launcher",
    "cuda_missing",
    "refused_codec",
    "staged",
    "triton_missing",
    "use_qaq_attention",
]
