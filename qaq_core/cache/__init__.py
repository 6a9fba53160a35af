"""The cache: sequences, the method that they share, and the cache that transformers sees."""

from qaq_core.cache.cache import QAQCache
from qaq_core.cache.method import Method
from qaq_core.cache.presets import PRESETS, make_method, register_family, register_preset
from qaq_core.cache.sequence import SequenceCache

__all__ = ["PRESETS", "Method", "QAQCache", "SequenceCache", "make_method", "register_family", "register_preset"]
