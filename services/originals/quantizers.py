"""The quantizers of a cache service: parsed once, the ones used last kept in memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Executor
from typing import Any

from qaq_core import Quantizer
from qaq_core.kernels import make_encoder
from services.common.errors import FailedPrecondition, InvalidArgument
from services.originals.store import PageStore

_OF_MODELS_BYTES = 512 << 20
"""Tables of models that are kept, and of single sequences, which have a base; the oldest are read from Redis again."""
_OF_SEQUENCES_BYTES = 256 << 20


class Quantizers:
    """Quantizers by id, from the store.

    Args:
        threads: parses tables.
    """

    def __init__(self, store: PageStore, threads: Executor) -> None:
        self._store, self._threads = store, threads
        self._of_models: OrderedDict[bytes, Quantizer] = OrderedDict()
        self._of_sequences: OrderedDict[bytes, Quantizer] = OrderedDict()
        self._sizes: dict[bytes, int] = {}  # of their tables

    async def get(self, codec_id: bytes) -> Quantizer:
        """The quantizer of that id.

        Raises:
            FailedPrecondition: it is not stored, or what is stored is not it; the worker puts it (again).
        """
        for kept in (self._of_sequences, self._of_models):
            if codec_id in kept:
                kept.move_to_end(codec_id)
                base = kept[codec_id].base
                if base is not None:
                    self._of_models.move_to_end(base.id)
                return kept[codec_id]
        tables = await self._store.get_codec(codec_id)
        if tables is None:
            raise FailedPrecondition(f"codec {codec_id.hex()} is unknown; call PutCodec first")
        try:
            quantizer = await self.parse(tables)
        except InvalidArgument as error:
            raise FailedPrecondition(f"codec {codec_id.hex()} is stored damaged; call PutCodec again") from error
        if quantizer.id != codec_id:
            raise FailedPrecondition(f"codec {codec_id.hex()} is stored with other tables; call PutCodec again")
        self._keep(quantizer, len(tables))
        return quantizer

    async def parse(self, tables: bytes) -> Quantizer:
        """The quantizer of those tables, with the encoders of this machine.

        Raises:
            InvalidArgument: they are not a quantizer.
            FailedPrecondition: its base is not stored.
        """
        base_id = await self._in_thread(_base_of, tables)
        base = None if base_id is None else await self.get(base_id)
        return await self._in_thread(_parsed, tables, base)

    def _keep(self, quantizer: Quantizer, size: int) -> None:
        if quantizer.base is not None and quantizer.base.id not in self._of_models:
            return  # it has gone meanwhile, and would live on in this one
        of_model = quantizer.base is None
        kept, most = (self._of_models, _OF_MODELS_BYTES) if of_model else (self._of_sequences, _OF_SEQUENCES_BYTES)
        kept[quantizer.id], self._sizes[quantizer.id] = quantizer, size
        while len(kept) > 1 and sum(self._sizes[one] for one in kept) > most:
            self._drop(*kept.popitem(last=False))

    def _drop(self, codec_id: bytes, quantizer: Quantizer) -> None:
        """Forgets one that is kept no longer, and those of which it is the base."""
        del self._sizes[codec_id]
        if quantizer.base is None:
            of_it = [other for other, one in self._of_sequences.items() if one.base and one.base.id == codec_id]
            for other in of_it:
                self._drop(other, self._of_sequences.pop(other))

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def _base_of(tables: bytes) -> bytes | None:
    try:
        return Quantizer.base_of(tables)
    except Exception as error:  # parsers of untrusted bytes may raise anything
        raise InvalidArgument(f"the tables are not a quantizer: {error}") from error


def _parsed(tables: bytes, base: Quantizer | None) -> Quantizer:
    try:
        return Quantizer.from_bytes(tables, base, make_encoder())
    except Exception as error:  # parsers of untrusted bytes may raise anything
        raise InvalidArgument(f"the tables are not a quantizer: {error}") from error
