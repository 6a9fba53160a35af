"""A journal: a file of JSON lines with finished work, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

_Entry = TypeVar("_Entry", bound=Any)


def name_of(about: dict[str, object], *tokens: bytes) -> str:
    """The name of a run: a hash of the model, the settings without the number of documents, and its first tokens."""
    digest = blake3(json.dumps({**about, "documents": None}, sort_keys=True).encode())
    for part in tokens:
        digest.update(part)
    return digest.hexdigest(16)


class Journal:
    """The lines of one run. Lines of other runs in the same file are ignored.

    Args:
        run: the run's name, see `name_of`.
        path: the file, or None to keep nothing.
    """

    def __init__(self, run: str, path: Path | None) -> None:
        self._run, self._path = run, path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return
        for line in self._path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed while writing
            if isinstance(entry, dict) and entry.pop("run", None) == self._run:
                yield entry

    def entries(self, kind: type[_Entry]) -> list[_Entry]:
        """Lines as objects of a dataclass. Lines with other fields belong to another version and are ignored."""
        names = {each.name for each in fields(kind)}
        return [kind(**entry) for entry in self if set(entry) == names]

    def add(self, entry: dict[str, Any]) -> None:
        if self._path is None:
            return
        complete = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with self._path.open("a") as file:
            file.write(("" if complete else "\n") + json.dumps({"run": self._run, **entry}) + "\n")
