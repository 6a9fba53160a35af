"""Limits of what a request may ask for. The router refuses what exceeds them, and the gateway does before it."""

from __future__ import annotations

MAX_CHOICES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_BIASED_TOKENS = 1024
MAX_TOP_LOGPROBS = 20
MAX_SESSION_ID_BYTES = 128
MAX_MESSAGES = 4096
MAX_TENANT = 128
MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
ROLES = ("system", "user", "assistant", "tool")
PRESETS = ("balanced", "paper", "fp16")
