"""Forms of rows at rest: which bytes of a row are kept as they are, and which are worth compressing.

The bits of a mantissa are noise, those of an exponent are not: a head's exponents take 2.7 bits of 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from qaq_core.base.pages import PageShape
from qaq_core.storage import eight_bit_codes, eight_bit_values, half_values

PageForm = Literal["plain", "lossless", "float16", "int8"]

_STEP = np.dtype("<f4")


@dataclass(frozen=True)
class Form:
    """How rows are stored.

    Attributes:
        code: of this form in the index of a page.
        exact: rows come back bit for bit.
        widths: bytes of a row that are stored as they are, and that are compressed.
        split: rows, uint8 [n, row_bytes], as uint8 [n, fixed] and uint8 [n, compressed].
        join: the rows again.
    """

    code: int
    exact: bool
    widths: Callable[[PageShape], tuple[int, int]]
    split: Callable[[np.ndarray, PageShape], tuple[np.ndarray, np.ndarray]]
    join: Callable[[np.ndarray, np.ndarray, PageShape], np.ndarray]


def _byte_widths(itemsize: int, shape: PageShape) -> tuple[int, int]:
    return (itemsize - 1) * shape.head_dim, shape.head_dim


def _split(rows: np.ndarray, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
    """Mantissas with their signs, and exponents: the byte on top once the sign is turned to the bottom."""
    words = np.ascontiguousarray(rows).view(f"<u{itemsize}")
    turned = (words << 1 | words >> (8 * itemsize - 1)).astype(words.dtype).view(np.uint8)
    parts = turned.reshape(len(rows), -1, itemsize)
    return parts[:, :, :-1].reshape(len(rows), -1), np.ascontiguousarray(parts[:, :, -1])


def _join(fixed: np.ndarray, exponents: np.ndarray, itemsize: int) -> np.ndarray:
    parts = np.empty((*exponents.shape, itemsize), np.uint8)
    parts[:, :, :-1] = fixed.reshape(*exponents.shape, itemsize - 1)
    parts[:, :, -1] = exponents
    turned = parts.reshape(len(parts), -1).view(f"<u{itemsize}")
    return (turned >> 1 | turned << (8 * itemsize - 1)).astype(turned.dtype).view(np.uint8)


def _itemsize(shape: PageShape) -> int:
    return shape.torch_dtype.itemsize


def _to_half(rows: np.ndarray, shape: PageShape) -> np.ndarray:
    """Values of 32 bits in half precision; others as they are."""
    return rows if _itemsize(shape) == 2 else half_values(_numbers(rows, shape)).astype("<f2").view(np.uint8)


def _from_half(rows: np.ndarray, shape: PageShape) -> np.ndarray:
    return rows if _itemsize(shape) == 2 else rows.view("<f2").astype("<f4").view(np.uint8)


def _numbers(rows: np.ndarray, shape: PageShape) -> np.ndarray:
    """float32 [n, head_dim]"""
    raw = torch.from_numpy(np.array(rows))
    return raw.view(shape.torch_dtype).float().numpy()


def _bytes(numbers: np.ndarray, shape: PageShape) -> np.ndarray:
    return torch.from_numpy(numbers).to(shape.torch_dtype).view(torch.uint8).numpy()


def _to_codes(rows: np.ndarray, shape: PageShape) -> tuple[np.ndarray, np.ndarray]:
    codes, steps = eight_bit_codes(_numbers(rows, shape))
    fixed = np.concatenate((codes.view(np.uint8), steps.astype(_STEP)[:, None].view(np.uint8)), 1)
    return fixed, np.empty((len(rows), 0), np.uint8)


def _from_codes(fixed: np.ndarray, _: np.ndarray, shape: PageShape) -> np.ndarray:
    codes, steps = fixed[:, : shape.head_dim], np.ascontiguousarray(fixed[:, shape.head_dim :])
    return _bytes(eight_bit_values(np.ascontiguousarray(codes).view(np.int8), steps.view(_STEP)[:, 0]), shape)


FORMS: dict[PageForm, Form] = {
    "lossless": Form(
        code=1,
        exact=True,
        widths=lambda shape: _byte_widths(_itemsize(shape), shape),
        split=lambda rows, shape: _split(rows, _itemsize(shape)),
        join=lambda fixed, exponents, shape: _join(fixed, exponents, _itemsize(shape)),
    ),
    "float16": Form(
        code=2,
        exact=False,
        widths=lambda shape: _byte_widths(2, shape),
        split=lambda rows, shape: _split(_to_half(rows, shape), 2),
        join=lambda fixed, exponents, shape: _from_half(_join(fixed, exponents, 2), shape),
    ),
    "int8": Form(
        code=3,
        exact=False,
        widths=lambda shape: (shape.head_dim + _STEP.itemsize, 0),
        split=_to_codes,
        join=_from_codes,
    ),
}
"""The forms of version 3. "plain" is version 2."""

BY_CODE = {form.code: form for form in FORMS.values()}
