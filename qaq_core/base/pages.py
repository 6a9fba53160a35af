"""Pages: the unit in which full-precision originals are kept.

A page is the keys and values of `tokens` consecutive positions, of all layers, in the model's dtype.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3

PAGE_TOKENS = 32
KEY, VALUE = 0, 1

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32", "float16" or "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class PageShape:
    """Layout of a page: [layers][K, V][kv_heads][tokens][head_dim], C order."""

    layers: int
    kv_heads: int
    tokens: int
    head_dim: int
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def dims(self) -> tuple[int, int, int, int, int]:
        return (self.layers, 2, self.kv_heads, self.tokens, self.head_dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector: a token's key or value in one head of one layer."""
        return self.head_dim * self.torch_dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.tokens * self.row_bytes

    def row_offset(
        self, layer: np.ndarray | int, side: np.ndarray | int, head: np.ndarray | int, token: np.ndarray | int
    ) -> np.ndarray | int:
        """Byte offset of a row inside the page's data."""
        return (((layer * 2 + side) * self.kv_heads + head) * self.tokens + token) * self.row_bytes


@dataclass(frozen=True)
class Page:
    """Originals of one page.

    Attributes:
        id: 32 bytes that name the content.
        data: CPU tensor [layers, 2, kv_heads, tokens, head_dim] in the model's dtype.
    """

    id: bytes
    shape: PageShape
    data: torch.Tensor

    def to_bytes(self) -> memoryview:
        """The raw values in C order, without a copy."""
        return memoryview(self.data.contiguous().view(torch.uint8).numpy().reshape(-1).data)

    @classmethod
    def from_bytes(cls, page_id: bytes, shape: PageShape, raw: bytes | bytearray) -> Page:
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(shape.torch_dtype)
        return cls(page_id, shape, flat.view(shape.dims))


def page_id(model_fingerprint: str, dtype: str, salt: bytes, parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Content address of a page: the same prefix of the same model has the same id on any worker.

    `parent` is the id of the page before (empty for the first). A salt per tenant keeps one tenant
    from probing another's prefixes.
    """
    digest = blake3()
    for part in (model_fingerprint.encode(), dtype.encode(), salt, parent):
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part)
    digest.update(np.asarray(token_ids, dtype="<i4").tobytes())
    return digest.digest(32)


def unique_names() -> Callable[[int], bytes]:
    """Page ids that no other page has, be it of this sequence or of another."""
    unique, count = uuid.uuid4().bytes, itertools.count()
    return lambda index: unique + next(count).to_bytes(16, "little")
