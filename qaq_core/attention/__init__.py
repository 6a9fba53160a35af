"""Attention over packed tokens. One file per implementation."""

from qaq_core.attention.base import Attention, LayerInput
from qaq_core.attention.correction import BetterRows, correct
from qaq_core.attention.cpu import CpuAttention
from qaq_core.attention.interface import use_qaq_attention
from qaq_core.attention.reference import LayerTokens, ReferenceAttention
from qaq_core.attention.triton import TritonAttention
from qaq_core.attention.triton import missing as triton_missing

__all__ = [
    "Attention",
    "BetterRows",
    "CpuAttention",
    "LayerInput",
    "LayerTokens",
    "ReferenceAttention",
    "TritonAttention",
    "correct",
    "triton_missing",
    "use_qaq_attention",
]
