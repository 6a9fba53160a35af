"""Fingerprints: which weights a model in memory has."""

from __future__ import annotations

from typing import Any

import torch
from blake3 import blake3

from qaq_core.models.shape import ModelShape

_NAME = "_qaq_fingerprint"


def leave_fingerprint(model: Any, fingerprint: str) -> None:
    """Writes down on the model which weights it has, until they change."""
    setattr(model, _NAME, (fingerprint, _changes(model)))


def left_fingerprint(model: Any) -> str | None:
    """What `leave_fingerprint` wrote down, if the weights have not changed since."""
    fingerprint, changes = getattr(model, _NAME, (None, None))
    return fingerprint if changes == _changes(model) else None


def weights_fingerprint(model: Any, shape: ModelShape | None = None) -> str:
    """BLAKE3 of the weights in memory, and of what decides how they attend; in this dtype."""
    shape = shape or ModelShape.of(model)
    dims = (shape.model_type, shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim, shape.kind)
    digest = blake3(repr(dims).encode(), max_threads=blake3.AUTO)
    digest.update(shape.frequencies.float().numpy().tobytes())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest(16)


def _changes(model: Any) -> tuple[int, int]:
    """How many parameters there are, and how often they were written in place."""
    versions = [0 if parameter.is_inference() else parameter._version for parameter in model.parameters()]
    return len(versions), sum(versions)
