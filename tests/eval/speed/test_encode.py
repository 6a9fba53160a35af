"""Encode speed: both implementations are timed, and the command writes what its schema says."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from qaq_eval.speed.encode import encode_speed, parse_shape
from services.cli.main import app

SCHEMA = Path(__file__).parents[3] / "qaq_eval" / "schemas" / "bench_encode.json"


def test_each_kind_of_work_is_timed_in_torch_and_in_cpp() -> None:
    rows = encode_speed((2, 2, 32), 40, repeat=2)
    assert {row.what: row.rows for row in rows} == {"prompt": 320, "group": 64, "request": 150}
    taken = {(row.what, row.kernel): row for row in rows}
    for (what, _), row in taken.items():
        assert row.ratio == pytest.approx(taken[what, "reference"].milliseconds / row.milliseconds)


def test_the_command_writes_what_its_schema_says(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--shape", "1/2/32", "--tokens", "16", "--repeat", "1", "--json", str(out)]
    done = CliRunner().invoke(app, ["bench", "encode", *options])
    assert done.exit_code == 0, done.output
    jsonschema.validate(json.loads(out.read_text()), json.loads(SCHEMA.read_text()))


def test_a_shape_that_cannot_be_is_refused() -> None:
    assert parse_shape("30/3/64") == (30, 3, 64)
    for bad in ("30/3", "30/0/64", "30/3/60", "a/3/64"):
        with pytest.raises(ValueError, match="/"):
            parse_shape(bad)
