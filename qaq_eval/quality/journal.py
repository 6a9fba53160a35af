"""A journal: finished work in a file of JSON lines, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

_Entry = TypeVar("_Entry", bound=Any)


def name_of(about: dict[str, object], *tokens: bytes) -> str:
    """Names a run: the model and the settings, but not how many documents, and tokens that it begins with."""
    digest = blake3(json.dumps({**about, "documents": None}, sort_keys=True).encode())
    for part in tokens:
        digest.update(part)
    return digest.hexdigest(16)


class Journal:
    """Lines of one run; those of other runs in the same file are left alone.

    Args:
        run: what the lines are of, see `name_of`.
        path: of the file, or None to keep nothing.
    """

    def __init__(self, run: str, path: Path | None) -> None:
        self._run, self._path = run, path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return
        for line in self._path.read_text().splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed while it wrote
            if isinstance(told, dict) and told.pop("run", None) == self._run:
                yield told

    def entries(self, kind: type[_Entry]) -> list[_Entry]:
        """Lines as objects of a dataclass; those with other fields are of an earlier version."""
        names = {each.name for each in fields(kind)}
        return [kind(**told) for told in self if set(told) == names]

    def add(self, entry: dict[str, Any]) -> None:
        if self._path is None:
            return
        whole = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with self._path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps({"run": self._run, **entry}) + "\n")
