"""Models: loading them, their shape, and faster linear layers and decode steps."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaq_core.models.compiled import compile_layers
    from qaq_core.models.default_model import default_model_path
    from qaq_core.models.linear import PackedLinear
    from qaq_core.models.loading import (
        Checkpoint,
        LoadedModel,
        device_of,
        find_checkpoint,
        load_model,
        load_tokenizer,
    )
    from qaq_core.models.shape import ModelShape

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "ModelShape",
    "PackedLinear",
    "compile_layers",
    "default_model_path",
    "device_of",
    "find_checkpoint",
    "load_model",
    "load_tokenizer",
]

_HOMES = {
    "compiled": ("compile_layers",),
    "default_model": ("default_model_path",),
    "linear": ("PackedLinear",),
    "loading": ("Checkpoint", "LoadedModel", "device_of", "find_checkpoint", "load_model", "load_tokenizer"),
    "shape": ("ModelShape",),
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: the default model's path needs no torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
