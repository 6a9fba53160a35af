"""A caller's key: as metadata, and with every call of a stub."""

from __future__ import annotations

from functools import partial
from typing import Any

from services.common.errors import Metadata


def authorization(key: str) -> Metadata:
    """The metadata of a call with a key; empty without one."""
    return (("authorization", f"Bearer {key}"),) if key else ()


class WithMetadata:
    """A stub whose calls have the same metadata, unless they name their own."""

    def __init__(self, stub: Any, metadata: Metadata) -> None:
        self._stub, self._metadata = stub, metadata

    def __getattr__(self, method: str) -> Any:
        return partial(getattr(self._stub, method), metadata=self._metadata)
