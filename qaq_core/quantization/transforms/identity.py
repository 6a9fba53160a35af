"""The transform of the paper: none."""

from __future__ import annotations

import torch

from qaq_core.quantization.transforms.base import Transform


class IdentityTransform:
    """Rows are the originals."""

    name = "identity"
    kept_bytes = 0

    def to(self, device: torch.device) -> Transform:
        return self

    def rows(self, side: int, originals: torch.Tensor, start: int) -> torch.Tensor:
        return originals.float()

    def rows_at(
        self, side: int, originals: torch.Tensor, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        return originals.float()

    def query(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        return query

    def center_scores(self, layer: int, query: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
        return None

    def center(self, layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    def restore(self, layer: int, output: torch.Tensor) -> torch.Tensor:
        return output

    def value_center(self, layer: int) -> torch.Tensor | None:
        return None

    def centered_on(self, originals: torch.Tensor, start: int) -> Transform:
        return self

    def maps(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}
