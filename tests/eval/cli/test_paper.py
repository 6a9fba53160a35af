"""`qaq paper`, run in this process."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from referencing import Registry, Resource
from typer.testing import CliRunner, Result

from services.cli.main import app
from tests.e2e.command import ROOT
from tests.shallow import LAYERS

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("first_layers")]
SCHEMAS = ROOT / "qaq_eval" / "schemas"
SMALL = ("--context", "120", "--decode", "4", "--documents", "1")


def paper(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["paper", *map(str, arguments)])


def checked(path: Path) -> dict:
    figures = json.loads(path.read_text())
    rows = Resource.from_contents(json.loads((SCHEMAS / "eval.json").read_text()))
    schema = json.loads((SCHEMAS / "paper.json").read_text())
    jsonschema.Draft202012Validator(schema, registry=Registry().with_resource("eval.json", rows)).validate(figures)
    return figures


def test_keys_are_more_sensitive_than_values(tmp_path: Path) -> None:
    path = tmp_path / "fig2a.json"
    shown = paper("fig2a", *SMALL, "--json", path)
    assert shown.exit_code == 0, shown.output
    assert "Keys against values" in shown.output
    kl = {row["config"]: row["kl_mean"] for row in checked(path)["rows"]}
    assert len(kl) == 16
    assert kl["k1v16"] > kl["k16v1"]
    assert kl["k8v16"] < 0.01 < kl["k1v16"]
    assert len(path.with_name("fig2a.json.parts.jsonl").read_text().splitlines()) == 16


def test_keys_have_outliers_in_few_channels(tmp_path: Path) -> None:
    path = tmp_path / "fig2c.json"
    shown = paper("fig2c", *SMALL, "--json", path)
    assert shown.exit_code == 0, shown.output
    rows = checked(path)["rows"]
    assert len(rows) == 2 * LAYERS
    keys, values = ([row["beyond"]["4"] for row in rows if row["side"] == side] for side in ("key", "value"))
    assert sum(keys) > sum(values)


def test_mistakes_are_told() -> None:
    shown = paper("fig9")
    assert shown.exit_code == 2
    assert "there are fig2a, fig2c" in " ".join(shown.output.replace("│", " ").split())
