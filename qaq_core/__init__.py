"""QAQ: a quality-adaptive quantized KV cache for transformers models (arXiv 2403.04643 and beyond)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaq_core.allocation.target import Target
    from qaq_core.base.errors import (
        ConfigError,
        CorruptPageError,
        ModelLoadError,
        OriginalsError,
        QAQError,
        QuantizationError,
        UnsupportedModelError,
    )
    from qaq_core.base.pages import Page, PageShape, page_id
    from qaq_core.base.rows import RowReply, RowRequest
    from qaq_core.base.statistics import CacheStatistics
    from qaq_core.cache.cache import QAQCache
    from qaq_core.cache.method import Method
    from qaq_core.cache.presets import make_method, register_family, register_preset
    from qaq_core.cache.sequence import SequenceCache
    from qaq_core.quantization.quantizer import Quantizer
    from qaq_core.storage.originals import InProcessOriginals, Originals

_HOMES = {
    "allocation.target": ("Target",),
    "base.errors": (
        "ConfigError",
        "CorruptPageError",
        "ModelLoadError",
        "OriginalsError",
        "QAQError",
        "QuantizationError",
        "UnsupportedModelError",
    ),
    "base.pages": ("Page", "PageShape", "page_id"),
    "base.rows": ("RowReply", "RowRequest"),
    "base.statistics": ("CacheStatistics",),
    "cache.cache": ("QAQCache",),
    "cache.method": ("Method",),
    "cache.presets": ("make_method", "register_family", "register_preset"),
    "cache.sequence": ("SequenceCache",),
    "quantization.quantizer": ("Quantizer",),
    "storage.originals": ("InProcessOriginals", "Originals"),
}

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
    "make_method",
    "page_id",
    "register_family",
    "register_preset",
]


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: the cache brings torch and transformers, the errors nothing."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
