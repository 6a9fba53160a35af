"""The same width for every key, and for every value."""

from __future__ import annotations

import torch

from qaq_core.allocation.policies.base import View
from qaq_core.base.errors import ConfigError
from qaq_core.base.widths import WIDTHS


class FixedPolicy:
    """Static widths. `FixedPolicy(16, 16)` keeps half precision: the `fp16` preset."""

    exceptions = elastic = False
    every = narrow_every = 1
    hysteresis = rise = 1.0
    lam = 1.0

    def __init__(self, key_bits: float, value_bits: float) -> None:
        known = [width / 2 for width in WIDTHS]
        if key_bits not in known or value_bits not in known or key_bits == 0:
            raise ConfigError(f"{key_bits}/{value_bits} bits are not among {known} (keys: not 0)")
        self.key_width, self.value_width = int(2 * key_bits), int(2 * value_bits)

    def demand(self, view: View) -> torch.Tensor:
        return view.importance.new_empty(view.shape, dtype=torch.uint8)

    def widths(self, demand: torch.Tensor, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full_like(demand, self.key_width), torch.full_like(demand, self.value_width)
