"""Quality: how close decoding from a quantized cache is to full precision, on real text."""

from qaq_eval.quality.config import Config
from qaq_eval.quality.distribution import LayerDistribution, distribution
from qaq_eval.quality.documents import Document, builtin_text, cut_documents, with_recall
from qaq_eval.quality.record import DocumentResult, EvalResult, ResultLog, run_name, summarize
from qaq_eval.quality.run import evaluate

__all__ = [
    "Config",
    "Document",
    "DocumentResult",
    "EvalResult",
    "LayerDistribution",
    "ResultLog",
    "builtin_text",
    "cut_documents",
    "distribution",
    "evaluate",
    "run_name",
    "summarize",
    "with_recall",
]
