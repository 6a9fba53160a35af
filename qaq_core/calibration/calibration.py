"""Calibration: what the method has to know of a model, measured once on text the model samples itself.

key_mean, value_mean      mean of a head's keys before RoPE, and of its values
key_matrix, value_matrix  the linear transform, see `quantization.transforms.whitening`
key_costs, value_costs    cost of an error in an octet of a transformed vector, see `sensitivities`
query_norm                upper 10% quantile of ‖q‖² of a KV head's queries (the paper's key formula)
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qaq_core.base.errors import ConfigError
from qaq_core.base.paths import cache_dir
from qaq_core.calibration.shipped import FILES
from qaq_core.models.shape import ModelShape

GRADIENTS, PERTURBATION = "gradients", "perturbation"
REVISION = 2
"""Of what is measured. Since 2 the first tokens, which stay exact, do not count."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """What the presets need.

    Attributes:
        key_matrix, value_matrix: float16 [layers, kv_heads, head_dim, head_dim].
        key_mean, value_mean: float32 [layers, kv_heads, head_dim].
        key_costs, value_costs: float32 [layers, kv_heads, head_dim/8].
        query_norm: float32 [layers, kv_heads].
        source: how costs were measured: "gradients", or "perturbation" where those had no memory.
        revision: of what was measured, see REVISION.
    """

    key_matrix: torch.Tensor
    value_matrix: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    key_costs: torch.Tensor
    value_costs: torch.Tensor
    query_norm: torch.Tensor
    source: str = GRADIENTS
    revision: int = REVISION

    @property
    def tables(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def check(self, shape: ModelShape) -> None:
        """Raises ConfigError if this was measured of a model of another shape."""
        dims = (shape.layers, shape.kv_heads, shape.head_dim)
        if tuple(self.key_mean.shape) != dims:
            raise ConfigError(
                f"the calibration is of a model with [layers, KV heads, head_dim] {list(self.key_mean.shape)}, and "
                f"this one has {list(dims)}: give this model's own fingerprint or calibration, or neither"
            )

    def to(self, device: torch.device) -> Calibration:
        moved: dict[str, Any] = {name: table.to(device) for name, table in self.tables.items()}
        return replace(self, **moved)

    def save(self, path: Path) -> None:
        """Writes safetensors, all at once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        tables = {name: table.cpu().contiguous() for name, table in self.tables.items()}
        save_file(tables, part, {"source": self.source, "revision": str(self.revision)})
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
            tables: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(**tables, source=known.get("source", GRADIENTS), revision=int(known.get("revision", 1)))


def known(fingerprint: str) -> Calibration | None:
    """A model's calibration, if it is shipped or was measured before."""
    cached = cached_at(fingerprint)
    shipped = cached_at(FILES.get(fingerprint, fingerprint)).name
    with resources.as_file(resources.files("qaq_core.calibration") / "tables" / shipped) as path:
        return kept_at(path) or kept_at(cached)


def cached_at(fingerprint: str) -> Path:
    """Where a model's calibration is kept."""
    return cache_dir() / "calibration" / f"{fingerprint}.safetensors"


def kept_at(path: Path) -> Calibration | None:
    """What was measured before, unless it was by a version that measured other things."""
    try:
        kept = Calibration.load(path) if path.is_file() else None
    except TypeError:
        kept = None
        log.info("%s has not the tables that are needed now", path)
    if kept is not None and kept.revision != REVISION:
        log.info("%s was measured by a version that measured other things", path)
        return None
    return kept
