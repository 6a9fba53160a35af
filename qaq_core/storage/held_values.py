"""How originals are held: bit for bit, or rounded, which takes fewer bytes."""

from __future__ import annotations

from typing import Literal, cast, get_args

import numpy as np
import torch

from qaq_core.base.errors import ConfigError

HeldValues = Literal["exact", "float16", "int8"]
_LARGEST_HALF = np.float32(65504)
_LARGEST_CODE = 127


def check_held_values(name: str) -> HeldValues:
    """Raises ConfigError unless originals can be held so."""
    if name not in get_args(HeldValues):
        raise ConfigError(f"originals={name!r} is unknown; take {', '.join(get_args(HeldValues))}")
    return cast(HeldValues, name)


def half_values(rows: np.ndarray) -> np.ndarray:
    """float16 [...]: rows, float32 [...], as nearly as half precision has them; infinities stay."""
    near = np.where(np.isinf(rows), rows, np.clip(rows, -_LARGEST_HALF, _LARGEST_HALF))
    return near.astype(np.float16)


def eight_bit_codes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row on a grid of its own, after a rotation that spreads its outliers over all dimensions.

    Args:
        rows: float32 [n, head_dim].
    Returns:
        codes int8 [n, head_dim] and steps float32 [n].
    """
    with np.errstate(over="ignore", invalid="ignore"):
        turned = _rotated(rows)
    steps = np.abs(turned).max(1) / np.float32(_LARGEST_CODE)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.nan_to_num(np.rint(turned / steps[:, None]), posinf=0, neginf=0)
    return np.clip(codes, -_LARGEST_CODE, _LARGEST_CODE).astype(np.int8), steps


def eight_bit_values(codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """float32 [n, head_dim]: what `eight_bit_codes` keeps of rows. The same bits on every machine.

    A row with NaN or infinity is NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return _rotated(codes.astype(np.float32) * steps[:, None])


def rounded(data: torch.Tensor, values: HeldValues) -> torch.Tensor:
    """Originals [..., head_dim] as a store that holds `values` gives them back, in their own dtype."""
    if values == "exact" or (values == "float16" and data.dtype != torch.float32):
        return data
    rows = data.float().reshape(-1, data.shape[-1]).numpy()
    near = half_values(rows).astype(np.float32) if values == "float16" else eight_bit_values(*eight_bit_codes(rows))
    return torch.from_numpy(near).view(data.shape).to(data.dtype)


def _rotated(rows: np.ndarray) -> np.ndarray:
    """Hadamard's matrix times each block of dimensions, which undoes itself. Additions in one order, so exact bits."""
    count, dim = rows.shape
    block = dim & -dim  # the largest power of two that divides it
    half = 1
    while half < block:
        pairs = rows.reshape(count, -1, 2, half)
        rows = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
        half *= 2
    return rows.reshape(count, dim) * np.float32(block**-0.5)
