"""Fixtures of the library's tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Triton decides when it is first imported whether its kernels are interpreted.
os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "core", deadline=None, max_examples=12, suppress_health_check=list(HealthCheck), derandomize=True
)
settings.load_profile("core")
