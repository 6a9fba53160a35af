"""`qaq bench lookup`: two workers, the same tokens, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from services.cli.main import app


def test_both_workers_give_the_same_tokens(model_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "lookup.json"
    options = ["--model", str(model_path), "--words", "30", "--new", "24", "--repeats", "1", "--json", str(target)]
    done = CliRunner().invoke(app, ["bench", "lookup", *options])
    assert done.exit_code == 0, done.output
    assert "tokens/s" in done.output
    measured = json.loads(target.read_text())
    assert measured["equal"] is True
    assert (measured["preset"], measured["new_tokens"], measured["repeats"]) == ("balanced", 24, 1)
    assert 0 <= measured["accepted"] <= measured["drafted"]
    assert measured["drafted"] > 0
    assert measured["ratio"] > 0
    assert measured["plain_tokens_per_second"] > 0
