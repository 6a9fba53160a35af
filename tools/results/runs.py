"""Recorded runs and their figures."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ENOUGH = 3
"""Runs from which on their spread is shown."""


@dataclass(frozen=True)
class Runs:
    """Runs of one command, at one commit, on one machine.

    Attributes:
        source: the file, or the folder of run-1.json and so on, below docs/results: "speed/decode-1024".
        facts: machine, commit, date, command and perhaps a note and the load average, of each run.
        results: what the command wrote in each run.
    """

    source: str
    facts: list[Json]
    results: list[Json]

    @property
    def first(self) -> Json:
        return self.results[0]

    @property
    def link(self) -> str:
        """A link from docs/results/README.md."""
        return f"[{Path(self.source).name.removesuffix('.json')}]({self.source})"

    def values(self, *path: str | int) -> list[Any]:
        """One value of each run: `path` leads to it through the result's objects and arrays."""
        found: list[Any] = self.results
        for step in path:
            found = [value[step] for value in found]
        return found

    def figure(self, *path: str | int, scale: float = 1.0, shape: str = "{:.1f}", unit: str = "") -> str:
        """The median of the runs; if there are enough of them, also the smallest and the largest."""
        if None in (found := self.values(*path)):
            return "not reached"
        values = [value * scale for value in found]
        median = shape.format(statistics.median(values))
        spread = f" ({shape.format(min(values))} to {shape.format(max(values))})" if len(values) >= ENOUGH else ""
        return median + unit + spread


class Results:
    """The JSON files below docs/results.

    Attributes:
        unread: files that nothing has asked for yet.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.unread = set(root.rglob("*.json"))

    def runs(self, folder: str) -> list[Runs]:
        """The runs below a folder, in the order of their paths; of one source those that can be compared together."""
        found: dict[tuple[str, ...], Runs] = {}
        for path in sorted((self._root / folder).rglob("*.json")):
            run = self._read(path)
            source = str((path.parent if path.stem.startswith("run-") else path).relative_to(self._root))
            same = found.setdefault(
                (source, run["machine"], run["commit"], run["command"]), Runs(source, facts=[], results=[])
            )
            same.results.append(run.pop("result"))
            same.facts.append(run)
        return list(found.values())

    def _read(self, path: Path) -> Json:
        self.unread.discard(path)
        run: Json = json.loads(path.read_text(encoding="utf-8"))
        return run
