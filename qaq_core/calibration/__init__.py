"""Calibration: what is measured of a model once, before its cache is quantized."""

from qaq_core.calibration.calibration import GRADIENTS, PERTURBATION, REVISION, Calibration, cached_at, known
from qaq_core.calibration.duration import Progress
from qaq_core.calibration.measurement import calibrate, measure, own_text, shown

__all__ = [
    "GRADIENTS",
    "PERTURBATION",
    "REVISION",
    "Calibration",
    "Progress",
    "cached_at",
    "calibrate",
    "known",
    "measure",
    "own_text",
    "shown",
]
