"""Seals: which model made a page, and that nobody without the deployment's secret made or changed it."""

from __future__ import annotations

import hmac
import struct
from typing import NamedTuple

from blake3 import blake3

from qaq_core.base.pages import PageShape
from services.common.secret import derive_key

SEAL_PART_BYTES = 16
DTYPES = ("float32", "float16", "bfloat16")
_SHAPE = struct.Struct("<H4I")
SHAPE_BYTES = _SHAPE.size


class Seal(NamedTuple):
    """The seal of one page.

    Attributes:
        model: 16 bytes, a hash of the identity of the model that made it.
        mac: 16 bytes, a keyed hash of id, model, shape and data.
    """

    model: bytes
    mac: bytes


class Seals:
    """Makes and verifies seals.

    Args:
        secret: of the deployment; without one, whoever knows a page can seal it.
        model: identity of the model whose pages are sealed here, see `LoadedModel.identity`.
    """

    def __init__(self, secret: str, model: str = "") -> None:
        self._key = derive_key(secret, "page seals")
        self._model = blake3(model.encode()).digest(SEAL_PART_BYTES)

    def make(self, page_id: bytes, shape: PageShape, data: bytes | bytearray | memoryview) -> Seal:
        """The seal of a page of this model."""
        return Seal(self._model, self._mac(self._model, page_id, shape, data))

    def again(self, seal: Seal, page_id: bytes, shape: PageShape, data: bytes | bytearray | memoryview) -> Seal:
        """The seal of what is kept of a page whose seal is right."""
        return Seal(seal.model, self._mac(seal.model, page_id, shape, data))

    def fits(self, seal: Seal, page_id: bytes, shape: PageShape, data: bytes | bytearray | memoryview) -> bool:
        """Whether a page, of any model, was sealed with this secret, under this id and with this data."""
        return hmac.compare_digest(self._mac(seal.model, page_id, shape, data), seal.mac)

    def is_own(self, seal: Seal) -> bool:
        """Whether the seal says that this model made the page."""
        return seal.model == self._model

    def _mac(self, model: bytes, page_id: bytes, shape: PageShape, data: bytes | bytearray | memoryview) -> bytes:
        facts = b"".join((page_id, model, shape_bytes(shape)))
        return blake3(facts, key=self._key).update(data).digest(SEAL_PART_BYTES)


def shape_bytes(shape: PageShape) -> bytes:
    return _SHAPE.pack(DTYPES.index(shape.dtype), shape.layers, shape.kv_heads, shape.tokens, shape.head_dim)


def read_shape(raw: bytes) -> PageShape | None:
    """The shape that `shape_bytes` wrote; None if it is none of a page."""
    dtype, layers, kv_heads, tokens, head_dim = _SHAPE.unpack(raw)
    if dtype >= len(DTYPES) or not (layers and kv_heads and tokens and head_dim) or head_dim % 16:
        return None
    return PageShape(layers, kv_heads, tokens, head_dim, DTYPES[dtype])
