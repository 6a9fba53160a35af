"""Calibration: what is measured of a model once, before its cache is quantized."""

from qaq_core.calibration.calibration import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
