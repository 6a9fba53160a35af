"""`qaq bench identity`: streams with and without identity, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from services.cli.main import app


def test_both_ways_are_measured(tmp_path: Path) -> None:
    target = tmp_path / "identity.json"
    done = CliRunner().invoke(
        app, ["bench", "identity", "--tokens", "100", "--rounds", "2", "--json", str(target)], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    assert "a streamed token" in done.output
    measured = json.loads(target.read_text())
    assert measured["tokens"] == 100
    assert len(measured["plain_us"]) == len(measured["secured_us"]) == 2
    assert min(*measured["plain_us"], *measured["secured_us"], measured["call_secured_us"]) > 0
