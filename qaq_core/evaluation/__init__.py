"""Evaluation: how far decoding from a quantized cache is from full precision, on real text."""

from qaq_core.evaluation.distribution import Spread, distribution
from qaq_core.evaluation.documents import Document, builtin_text, cut, with_recall
from qaq_core.evaluation.record import Part, PartLog, Row, run_name, summarize
from qaq_core.evaluation.run import Config, evaluate
from qaq_core.evaluation.speed import SpeedRow, decode_speed

__all__ = [
    "Config",
    "Document",
    "Part",
    "PartLog",
    "Row",
    "SpeedRow",
    "Spread",
    "builtin_text",
    "cut",
    "decode_speed",
    "distribution",
    "evaluate",
    "run_name",
    "summarize",
    "with_recall",
]
