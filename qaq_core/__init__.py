"""QAQ: a quality-adaptive quantized KV cache for transformers models (arXiv 2403.04643 and beyond)."""

from qaq_core.cache import QAQCache
from qaq_core.errors import (
    ConfigError,
    CorruptPageError,
    ModelLoadError,
    OriginalsError,
    QAQError,
    QuantizationError,
    UnsupportedModelError,
)
from qaq_core.method import Method, Target
from qaq_core.originals import InProcessOriginals, Originals, RowReply, RowRequest
from qaq_core.pages import Page, PageShape, page_id
from qaq_core.quantizer import Quantizer
from qaq_core.sequence import CacheStatistics, SequenceCache

__all__ = [
    "CacheStatistics",
    "ConfigError",
    "CorruptPageError",
    "InProcessOriginals",
    "Method",
    "ModelLoadError",
    "Originals",
    "OriginalsError",
    "Page",
    "PageShape",
    "QAQCache",
    "QAQError",
    "QuantizationError",
    "Quantizer",
    "RowReply",
    "RowRequest",
    "SequenceCache",
    "Target",
    "UnsupportedModelError",
    "page_id",
]
