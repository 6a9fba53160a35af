"""`qaq eval` as a user runs it. tests/eval/cli has its kinds and its mistakes, in the test's own process."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

from .command import ROOT, here, qaq

SCHEMA = json.loads((ROOT / "qaq_eval" / "schemas" / "eval.json").read_text())
SMALL = ("--context", "160", "--decode", "6", "--documents", "1")


def test_rows_are_written_and_a_second_run_takes_them_from_before(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    shown = qaq("eval", *SMALL, "--configs", "balanced@2.2,uniform-2", "--json", path)
    assert shown.returncode == 0, shown.stderr
    figures = json.loads(path.read_text())
    jsonschema.validate(figures, SCHEMA)
    good, bad = figures["rows"]
    assert (good["config"], bad["config"]) == ("balanced@2.2", "uniform-2")
    assert "balanced@2.2" in shown.stdout
    assert good["kl_mean"] < bad["kl_mean"]
    assert good["tokens"] == 6
    kept = tmp_path / "eval.json.parts.jsonl"
    lines = kept.read_text().splitlines()
    assert len(lines) == 2
    again = here("eval", *SMALL, "--configs", "uniform-2,balanced@2.2", "--json", path)
    assert again.returncode == 0, again.stderr
    assert kept.read_text().splitlines() == lines
    assert json.loads(path.read_text())["rows"] == [bad, good]
