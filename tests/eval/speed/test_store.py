"""Forms of stored pages: every one is measured, and the command writes what its schema says."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from typer.testing import CliRunner

from qaq_eval.speed.store import FORMS, store_speed
from services.cli.main import app

SCHEMA = Path(__file__).parents[3] / "qaq_eval" / "schemas" / "bench_store.json"


def test_every_form_is_measured() -> None:
    values = torch.randn(2, 2, 1, 70, 64, generator=torch.Generator().manual_seed(0))
    rows = {(row.dtype, row.form): row for row in store_speed(values, [torch.float32, torch.bfloat16], repeat=2)}
    assert len(rows) == 2 * len(FORMS)
    for dtype in ("float32", "bfloat16"):
        plain = rows[dtype, "plain"]
        assert plain.ratio == 1
        for form in FORMS:
            row = rows[dtype, form]
            assert row.ratio == pytest.approx(row.page_bytes / plain.page_bytes)
            exact = form in ("plain", "lossless") or (form == "float16" and dtype == "bfloat16")
            assert (row.error == 0) == exact
    assert rows["bfloat16", "lossless"].ratio < 0.66
    assert rows["float32", "int8"].ratio < 0.3


def test_the_command_writes_what_its_schema_says(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = CliRunner().invoke(
        app, ["bench", "store", "--tokens", "32", "--repeat", "1", "--calls", "2", "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    jsonschema.validate(written, json.loads(SCHEMA.read_text()))
    assert [call["call"] for call in written["calls"]] == ["put", "fetch", "rows", "redis set", "redis get"]
    assert all(0 < call["p50_ms"] <= call["p99_ms"] for call in written["calls"])


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Too short.")
    done = CliRunner().invoke(app, ["bench", "store", "--text", str(tmp_path / "text")])
    assert done.exit_code == 1
    assert "take fewer --tokens" in " ".join(done.output.split())
