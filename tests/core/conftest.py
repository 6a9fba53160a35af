"""Fixtures of the library's tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "core", deadline=None, max_examples=12, suppress_health_check=list(HealthCheck), derandomize=True
)
settings.load_profile("core")
