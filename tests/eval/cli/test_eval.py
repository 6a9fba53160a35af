"""`qaq eval` in this process: each kind of evaluation writes what its schema says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource
from typer.testing import CliRunner

from qaq_eval import quality
from qaq_eval.quality import needle
from services.cli.main import app

pytestmark = pytest.mark.model
SCHEMAS = Path(__file__).parents[3] / "qaq_eval" / "schemas"


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)


def figures(path: Path, schema: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(path.read_text())
    rows = Resource.from_contents(json.loads((SCHEMAS / "eval.json").read_text()))
    registry = Registry().with_resource("eval.json", rows)
    validator = jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{schema}.json").read_text()), registry=registry)
    validator.validate(told)
    return told


@pytest.mark.usefixtures("first_layers")
def test_turns(tmp_path: Path) -> None:
    path, page = tmp_path / "turns.json", tmp_path / "turns.html"
    asked = ("--turns", 2, "--context", 60, "--decode", 4, "--documents", 1)
    shown = run(*map(str, asked), "--configs", "fp16,uniform-2", "--json", path, "--html", page)
    assert shown.exit_code == 0, shown.output
    told = figures(path, "eval-turns")
    assert [(row["turn"], row["config"]) for row in told["rows"]] == [
        (1, "fp16"),
        (1, "uniform-2"),
        (2, "fp16"),
        (2, "uniform-2"),
    ]
    assert told["rows"][2]["kl_mean"] < told["rows"][3]["kl_mean"]
    assert page.read_text().count("<svg") >= 1
    assert len((tmp_path / "turns.json.parts.jsonl").read_text().splitlines()) == 4


@pytest.mark.usefixtures("loaded_once")
def test_needle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "DEPTHS", (50,))
    path = tmp_path / "needle.json"
    shown = run("--needle", "--context", "420", "--configs", "uniform-8", "--json", path)
    assert shown.exit_code == 0, shown.output
    (row,) = figures(path, "eval-needle")["rows"]
    assert (row["depth"], row["found"], row["found_fp16"]) == (50, 1, 1)
    kept = (tmp_path / "needle.json.parts.jsonl").read_text()
    assert run("--needle", "--context", "420", "--configs", "uniform-8", "--json", path).exit_code == 0
    assert (tmp_path / "needle.json.parts.jsonl").read_text() == kept


@pytest.mark.usefixtures("first_layers")
def test_long_answers(tmp_path: Path) -> None:
    path, page = tmp_path / "long.json", tmp_path / "long.html"
    asked = ("--long", "--context", 60, "--decode", 8, "--documents", 1, "--json", path, "--html", page)
    shown = run(*map(str, asked), "--configs", "fp16,uniform-2")
    assert shown.exit_code == 0, shown.output
    told = figures(path, "eval-long")
    assert [row["config"] for row in told["rows"]] == ["fp16", "uniform-2"]
    assert [part["last"] for part in told["positions"]] == [*range(1, 9), *range(1, 9)]
    mean = sum(part["kl_mean"] for part in told["positions"][8:]) / 8
    assert mean == pytest.approx(told["rows"][1]["kl_mean"])
    assert told["rows"][1]["kl_max"] >= told["rows"][1]["kl_p99"] >= told["rows"][1]["kl_median"]
    assert "Loss along the answer" in page.read_text()
    kept = (tmp_path / "long.json.parts.jsonl").read_text()
    assert len(kept.splitlines()) == 3  # the answer, and a document of two configurations
    assert run(*map(str, asked), "--configs", "fp16,uniform-2").exit_code == 0
    assert (tmp_path / "long.json.parts.jsonl").read_text() == kept


@pytest.mark.usefixtures("first_layers")
@pytest.mark.parametrize("kind", ["needles", "formats"])
def test_what_is_asked_late(tmp_path: Path, kind: str) -> None:
    path, count = tmp_path / "late.json", 2 if kind == "needles" else 1
    asked = (f"--{kind}", count, "--context", 700, "--configs", "uniform-8", "--json", path)
    shown = run(*map(str, asked))
    assert shown.exit_code == 0, shown.output
    rows = figures(path, "eval-probes")["rows"]
    assert [row["order"] for row in rows] == [1, 2]
    assert rows[0]["position"] < rows[1]["position"] < 700
    for row in rows:
        assert row["score"] == row["score_fp16"]  # 8 bits are as good as exact
    kept = (tmp_path / "late.json.parts.jsonl").read_text()
    assert run(*map(str, asked)).exit_code == 0
    assert (tmp_path / "late.json.parts.jsonl").read_text() == kept


@pytest.mark.usefixtures("first_layers")
def test_tasks(tmp_path: Path) -> None:
    questions, path = tmp_path / "piqa.jsonl", tmp_path / "tasks.json"
    asked = [{"goal": f"To open door {i}", "sol1": "push it", "sol2": "eat it", "label": 0} for i in range(3)]
    questions.write_text("\n".join(map(json.dumps, asked)))
    shown = run(
        "--tasks", "piqa", "--task-file", f"piqa={questions}", "--questions", "2", "--shots", "2",
        "--window", "4", "--configs", "uniform-8", "--json", path,
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    (row,) = figures(path, "eval-tasks")["rows"]
    assert (row["task"], row["questions"], row["shots"], row["agreement"]) == ("piqa", 2, 2, 1)
    assert row["compression"] > 1


def test_parts_are_of_one_form_of_weights(tmp_path: Path) -> None:
    path, kept = tmp_path / "text.json", tmp_path / "text.json.parts.jsonl"
    asked = ("--context", "60", "--decode", "4", "--documents", "1", "--configs", "uniform-3", "--json", path)
    losses = []
    for form, parts in (("plain", 1), ("float32", 2), ("float32", 2), ("plain", 2)):
        shown = run(*asked, "--weights", form)
        assert shown.exit_code == 0, shown.output
        told = figures(path, "eval")
        assert told["weights"] == form
        assert len(kept.read_text().splitlines()) == parts
        losses.append(told["rows"][0]["nll"])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-3)  # full precision's, and lossless ones differ in sums
    assert (losses[1], losses[0]) == (losses[2], losses[3])


@pytest.mark.usefixtures("first_layers")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--needle", "--turns", "2"), "take one"),
        (("--needle", "--html", "page.html"), "--html shows texts and turns"),
        (("--tasks", "piqa", "--task-file", "questions.jsonl"), "write --task-file as a task and its file"),
        (("--tasks", "piqa", "--task-file", "hellaswag=x.jsonl"), "which --tasks does not"),
        (("--tasks", "piqa", "--task-file", "piqa=nowhere.jsonl"), "No such file"),
        (("--turns", "100"), "tokens exceed the model's context"),
        (("--long", "--recall"), "take one"),
        (("--needles", "2", "--html", "page.html"), "--html shows texts and turns"),
        (("--needle", "--window", "8"), "leave --window out"),
        (("--needles", "2", "--context", "300"), "too short for 2 needles"),
        (("--weights", "int3"), "unknown weights 'int3'; take auto, plain, float32"),
        (("--text", "short.txt"), "the text has 0 documents"),
        (("--text", "none.txt"), "No such file"),
        (("--configs", "balanced@much"), "is no configuration"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("Too short.")
    shown = run("--configs", "uniform-8", *arguments)
    assert shown.exit_code in (1, 2)
    assert sentence in " ".join(shown.output.replace("│", " ").split())


@pytest.mark.usefixtures("first_layers")
def test_settings_are_part_of_a_name() -> None:
    shown = run("--context", 60, "--decode", 2, "--documents", 1, "--configs", "paper[codec=normal]")
    assert shown.exit_code == 0, shown.output
    assert "paper[codec=normal]" in shown.output


@pytest.mark.usefixtures("first_layers")
@pytest.mark.parametrize(
    ("options", "modules", "missing", "need"),
    [
        (("--tasks", "arc_easy"), ("tasks",), "lm_eval", "lm-eval"),
        (("--html", "page.html"), ("report", "plots"), "matplotlib", "matplotlib"),
    ],
)
def test_a_package_that_is_missing_is_named(
    options: tuple[str, ...], modules: tuple[str, ...], missing: str, need: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in modules:  # as if nothing had imported them
        monkeypatch.delitem(sys.modules, f"qaq_eval.quality.{name}", raising=False)
        monkeypatch.delattr(quality, name, raising=False)
    for name in [missing, *(name for name in sys.modules if name.startswith(f"{missing}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    shown = run(*options)
    assert shown.exit_code == 1
    assert need in shown.output
    assert "pip install 'qaq-kv[eval]'" in " ".join(shown.output.split())
