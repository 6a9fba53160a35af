"""Calibration: what is measured of a model once, before its cache is quantized."""

from qaq_core.calibration.calibration import (
    GRADIENTS,
    PERTURBATION,
    Calibration,
    cached_at,
    calibrate,
    known,
    measure,
    own_text,
    shown,
)
from qaq_core.calibration.duration import Progress

__all__ = [
    "GRADIENTS",
    "PERTURBATION",
    "Calibration",
    "Progress",
    "cached_at",
    "calibrate",
    "known",
    "measure",
    "own_text",
    "shown",
]
