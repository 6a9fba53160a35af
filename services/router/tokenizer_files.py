"""The files of a tokenizer as one archive, for servers that tokenize themselves."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Archive:
    """A zip of a tokenizer's files, and its SHA-256 in hexadecimal."""

    data: bytes
    sha256: str

    def pieces(self, size: int) -> Iterator[bytes]:
        """Its bytes, at most `size` at a time."""
        for start in range(0, len(self.data), size):
            yield self.data[start : start + size]


class TokenizerFiles:
    """The files that transformers writes of a tokenizer, its chat template included. Made at the first call; routers
    with one model make the same bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._archive: Archive | None = None
        self._making = asyncio.Lock()

    async def archive(self) -> Archive:
        async with self._making:
            if self._archive is None:
                self._archive = await asyncio.to_thread(self._make)
            return self._archive

    def _make(self) -> Archive:
        buffer = io.BytesIO()
        with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(buffer, "w") as archive:
            self.tokenizer.save_pretrained(directory)
            for path in sorted(Path(directory).rglob("*")):
                if path.is_file():
                    # A ZipInfo without a time: the bytes shall depend on the files alone.
                    entry = zipfile.ZipInfo(path.relative_to(directory).as_posix())
                    archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        return Archive(buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest())
