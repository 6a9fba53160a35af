"""Speed: decode steps, attention, encoding, and forms of weights."""

from qaq_eval.speed.decode import DecodeSpeed, decode_speed

__all__ = ["DecodeSpeed", "decode_speed"]
