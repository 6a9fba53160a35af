"""Adaptation: a sequence's own quantizer, from the tokens that are packed first.

It has the sequence's means, which leave less to quantize, and a rotation where the sequence is long enough to pay for
its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qaq_core.base.pages import KEY, VALUE
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms.rotation import fit_rotation

MEANS_TOKENS = 64
"""Fewer tokens predict the means of later ones badly."""

ROTATION_TOKENS = 24
"""Tokens per dim from which a rotation pays for its bytes, which grow with the square of head_dim."""


@dataclass(frozen=True)
class Adaptation:
    """Makes the quantizers of sequences.

    Attributes:
        costs: of keys and values, cost of an error in an octet, float32 [layers, kv_heads, octets].
        rotation: whether sequences may have a rotation.
    """

    costs: tuple[torch.Tensor, torch.Tensor]
    rotation: bool = True

    def __call__(self, quantizer: Quantizer, originals: torch.Tensor, start: int) -> Quantizer:
        """The quantizer of a sequence whose first packed tokens these are.

        Args:
            quantizer: the model's.
            originals: [layers, 2, kv_heads, n, head_dim] of positions start, start+1, ….
        """
        tokens, head_dim = originals.shape[3:]
        if tokens < MEANS_TOKENS:
            return quantizer
        own = quantizer.centered_on(originals, start)
        if not self.rotation or tokens < ROTATION_TOKENS * head_dim:
            return own
        keys, values = (
            fit_rotation(own.rows(side, originals[:, side], start), self.costs[side]) for side in (KEY, VALUE)
        )
        return own.rotated((keys, values))
