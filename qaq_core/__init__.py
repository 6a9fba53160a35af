"""QAQ: a quality-adaptive quantized KV cache for transformers models (arXiv 2403.04643 and beyond)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from qaq_core.sequence import SequenceCache
    from qaq_core.statistics import CacheStatistics

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

_HOMES = {
    "qaq_core.cache": ("QAQCache",),
    "qaq_core.errors": (
        "ConfigError",
        "CorruptPageError",
        "ModelLoadError",
        "OriginalsError",
        "QAQError",
        "QuantizationError",
        "UnsupportedModelError",
    ),
    "qaq_core.method": (
        "Method",
        "Target",
    ),
    "qaq_core.originals": (
        "InProcessOriginals",
        "Originals",
        "RowReply",
        "RowRequest",
    ),
    "qaq_core.pages": (
        "Page",
        "PageShape",
        "page_id",
    ),
    "qaq_core.quantizer": ("Quantizer",),
    "qaq_core.sequence": ("SequenceCache",),
    "qaq_core.statistics": ("CacheStatistics",),
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: the cache brings torch and transformers, the errors nothing."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'qaq_core' has no attribute {name!r}")
