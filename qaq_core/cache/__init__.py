"""The cache: sequences, the method that they share, and the cache that transformers sees."""

from qaq_core.cache.backends import faster_kernel, make_attention
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.method import Method, Pair
from qaq_core.cache.presets import PRESETS, make_method, register_family, register_preset
from qaq_core.cache.sequence import SequenceCache
from qaq_core.cache.view import CacheView

__all__ = [
    "PRESETS",
    "CacheView",
    "Method",
    "Pair",
    "QAQCache",
    "SequenceCache",
    "faster_kernel",
    "make_attention",
    "make_method",
    "register_family",
    "register_preset",
]
