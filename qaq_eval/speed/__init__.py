"""Speed: decode steps, attention alone, encoding, and what faster weights lose."""

from qaq_eval.speed.decode import SpeedRow, decode_speed

__all__ = ["SpeedRow", "decode_speed"]
