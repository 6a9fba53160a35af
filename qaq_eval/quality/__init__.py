"""Evaluation: how far decoding from a quantized cache is from full precision, on real text."""

from qaq_eval.quality.distribution import Spread, distribution
from qaq_eval.quality.documents import Document, builtin_text, cut, with_recall
from qaq_eval.quality.record import Part, PartLog, Row, run_name, summarize
from qaq_eval.quality.run import Config, evaluate

__all__ = [
    "Config",
    "Document",
    "Part",
    "PartLog",
    "Row",
    "Spread",
    "builtin_text",
    "cut",
    "distribution",
    "evaluate",
    "run_name",
    "summarize",
    "with_recall",
]
