"""Models: loading them, their shape, and faster linear layers and decode steps."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaq_core.models.checkpoint import Checkpoint, find_checkpoint, is_hub_id, name_of
    from qaq_core.models.compiled import compile_layers
    from qaq_core.models.decoder import Decoder
    from qaq_core.models.default_model import default_model_path
    from qaq_core.models.fingerprint import left_fingerprint, weights_fingerprint
    from qaq_core.models.linear import PackedLinear
    from qaq_core.models.loading import LoadedModel, device_of, load_model
    from qaq_core.models.shape import ModelShape
    from qaq_core.models.tokenizer import avoid_torch, load_tokenizer

__all__ = [
    "Checkpoint",
    "Decoder",
    "LoadedModel",
    "ModelShape",
    "PackedLinear",
    "avoid_torch",
    "compile_layers",
    "default_model_path",
    "device_of",
    "find_checkpoint",
    "is_hub_id",
    "left_fingerprint",
    "load_model",
    "load_tokenizer",
    "name_of",
    "weights_fingerprint",
]

_HOMES = {
    "checkpoint": ("Checkpoint", "find_checkpoint", "is_hub_id", "name_of"),
    "compiled": ("compile_layers",),
    "decoder": ("Decoder",),
    "default_model": ("default_model_path",),
    "fingerprint": ("left_fingerprint", "weights_fingerprint"),
    "linear": ("PackedLinear",),
    "loading": ("LoadedModel", "device_of", "load_model"),
    "shape": ("ModelShape",),
    "tokenizer": ("avoid_torch", "load_tokenizer"),
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: the default model's path and tokenizers need no torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
