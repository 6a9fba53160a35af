"""Calibration: what the method has to know of a model, measured once on text the model samples itself.

key_mean, value_mean      mean of a head's keys before RoPE, and of its values
key_matrix, value_matrix  the linear transform, see `quantization.transforms.whitening`
key_costs, value_costs    cost of an error in an octet of a transformed vector, see `sensitivities`
query_norm                upper 10% quantile of ‖q‖² of a KV head's queries (the paper's key formula)
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qaq_core.base.errors import ConfigError
from qaq_core.base.paths import cache_dir
from qaq_core.calibration.shipped import FILES
from qaq_core.models.shape import ModelShape

GRADIENTS, PERTURBATION = "gradients", "perturbation"

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
    """

    key_matrix: torch.Tensor
    value_matrix: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    key_costs: torch.Tensor
    value_costs: torch.Tensor
    query_norm: torch.Tensor
    source: str = GRADIENTS

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
        return Calibration(**{name: table.to(device) for name, table in self.tables.items()}, source=self.source)

    def save(self, path: Path) -> None:
        """Writes safetensors, all at once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        tables = {name: table.cpu().contiguous() for name, table in self.tables.items()}
        save_file(tables, part, {"source": self.source})
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        with safe_open(path, "pt") as file:
            source = (file.metadata() or {}).get("source", GRADIENTS)
            return cls(**{name: file.get_tensor(name) for name in file.keys()}, source=source)  # noqa: SIM118


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
        return Calibration.load(path) if path.is_file() else None
    except TypeError:
        log.info("%s has not the tables that are needed now", path)
        return None
