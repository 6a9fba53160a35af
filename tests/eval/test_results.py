"""docs/results says what its JSON files say, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tools import measure
from tools.results.__main__ import main
from tools.results.runs import Results
from tools.results.tables import decode, prefill, quality, serving, sources

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FILES = sorted((DOCS / "results").rglob("*.json"))
EVAL = ROOT / "qaq_eval" / "schemas"
SCHEMAS = {
    "qaq eval": "eval",
    "qaq eval --tasks": "eval-tasks",
    "qaq eval --needle": "eval-needle",
    "qaq eval --turns": "eval-turns",
    "qaq eval --long": "eval-long",
    "qaq eval --needles": "eval-probes",
    "qaq eval --formats": "eval-probes",
    "qaq paper": "paper",
    "qaq bench decode": "bench_decode",
    "qaq bench prefill": "bench_prefill",
    "qaq bench attention": "bench_attention",
    "qaq bench serve": "bench_serve",
    "qaq bench prefix": "bench_prefix",
    "qaq bench elastic": "bench_elastic",
    "python -m tests.faults": "bench_chaos",
}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A copy of docs that can be changed."""
    return Path(shutil.copytree(DOCS, tmp_path / "docs"))


def record(path: Path, result: dict[str, Any], **facts: str) -> None:
    run = {"machine": "M", "commit": "C", "date": "2026-01-01", "command": "qaq bench", **facts, "result": result}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))


def decoded(rate: float) -> dict[str, Any]:
    row = {"context": 64, "batch": 1, "cache": "balanced", "tokens_per_second": rate, "median_ms": 1e3 / rate}
    rows = [{**row, "ratio_to_dynamic_cache": rate / 10, "kv_bytes": 4_000_000}]
    return {"weights": "plain", "compiled": False, "threads": 1, "isa": None, "rows": rows}


def test_the_page_says_what_the_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_every_figure_of_a_run_can_be_traced() -> None:
    for path in FILES:
        run = json.loads(path.read_text())
        assert {"machine", "commit", "date", "command", "result"} <= run.keys(), path
        assert not re.search(r"[ =]/", run["command"]), f"{path} names folders of one machine"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DOCS / "results")))
def test_results_are_what_the_commands_write_today(path: Path) -> None:
    run = json.loads(path.read_text())
    command = run["command"].removeprefix("env OMP_NUM_THREADS=1 ")
    if command.startswith("qaq demo"):
        schema = (ROOT / "services" / "schemas" / "demo.json").read_text()
    else:
        kind = max((start for start in SCHEMAS if command.startswith(start)), key=len)
        schema = (EVAL / f"{SCHEMAS[kind]}.json").read_text()
    rows = Resource.from_contents(json.loads((EVAL / "eval.json").read_text()))
    registry = Registry().with_resource("eval.json", rows)
    Draft202012Validator(json.loads(schema), registry=registry).validate(run["result"])


def test_changed_figures_are_noticed_and_written(docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = docs / "results" / "quality" / "baselines.json"
    changed.write_text(changed.read_text().replace('"config": "kivi-2"', '"config": "kivi-9"'))
    assert main(["--check", "--docs", str(docs)]) == 1
    told = capsys.readouterr().out
    assert "results/README.md is stale" in told
    assert "results/kl.svg is stale" in told
    assert "paper.md is stale" not in told


def test_an_edited_page_is_noticed_and_written_again(docs: Path) -> None:
    page, paper = docs / "results" / "README.md", docs / "paper.md"
    before = page.read_text(), paper.read_text()
    page.write_text(before[0].replace("0.0012", "0.0011", 1))
    paper.write_text(before[1].replace("4.4572", "4.4571"))
    assert main(["--check", "--docs", str(docs)]) == 1
    assert main(["--docs", str(docs)]) == 0
    assert (page.read_text(), paper.read_text()) == before


def test_a_file_that_no_table_reads_is_named(docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (docs / "results" / "old.json").write_text("{}")
    assert main(["--check", "--docs", str(docs)]) == 1
    assert "no table reads results/old.json" in capsys.readouterr().out


def test_an_experiment_that_no_table_shows_is_refused(docs: Path) -> None:
    old = docs / "results" / "paper" / "smollm2-table2.json"
    old.write_text(old.read_text().replace('"experiment": "table2"', '"experiment": "fig4"'))
    with pytest.raises(ValueError, match="no table shows paper/smollm2-table2"):
        main(["--check", "--docs", str(docs)])


def evaluated(task: str, model: str = "tiny", **facts: Any) -> dict[str, Any]:
    return {"model": model, "task": task, "text": "t.txt", "context": 64, "decode": 8, "documents": 1, **facts}


def quality_row(config: str, **more: float) -> dict[str, Any]:
    numbers = {"compression": 5.0, "bits_key": 2.0, "bits_value": 2.0, "delta_nll": 0.1, "delta_nll_se": 0.0}
    numbers |= {"kl_mean": 0.25, "kl_p99": 1.5, "top1_agreement": 0.5, "requantize_bytes_per_token": 0.0}
    return {"config": config, "context": 64, "documents": 1, **numbers, **more}


def test_files_without_tails_are_read_too(tmp_path: Path) -> None:
    new = {"kl_mean_se": 0.01, "kl_median": 0.2, "kl_median_se": 0.0, "kl_p99_se": 0.1, "kl_max": 9.0, "kl_max_se": 2.0}
    rows = [quality_row("old"), quality_row("new", **new)]
    record(tmp_path / "rivals" / "a.json", evaluated("text", rows=rows, window=128))
    old, now = quality(Results(tmp_path).runs("rivals")).splitlines()[2:]
    assert "| 0.2500 | not recorded | 1.500 | not recorded |" in old
    assert "| 0.2500 ± 0.0100 | 0.2000 ± 0.0000 | 1.500 ± 0.100 | 9.00 ± 2.00 |" in now
    assert "| 64, window 128 |" in now


def test_rivals_and_late_runs_have_sections_and_a_plot_for_each_model(docs: Path) -> None:
    for folder in ("rivals", "late"):
        shutil.rmtree(docs / "results" / folder, ignore_errors=True)
    for picture in (docs / "results").glob("*.svg"):
        picture.unlink()
    assert main(["--docs", str(docs)]) == 0
    assert (docs / "results" / "README.md").read_text().count("No run is recorded.") >= 2
    for model in ("tiny", "other"):
        rows = [quality_row("balanced@8x"), quality_row("oscar-2", compression=6.0, kl_mean=0.3)]
        record(docs / "results" / "rivals" / f"{model}.json", evaluated("text", model, rows=rows))
    tails = {"kl_mean": 0.1, "kl_max": 1.0, "delta_nll": 0.0, "delta_nll_se": 0.0}
    parts = [{"config": "kivi-2", "first": 1, "last": 4, **tails}, {"config": "kivi-2", "first": 5, "last": 8, **tails}]
    parts[1]["kl_mean"] = 0.4
    row = quality_row("kivi-2", kl_max=1.0)
    record(docs / "results" / "late" / "long.json", evaluated("long", rows=[row], positions=parts))
    probe = {"config": "kivi-2", "order": 1, "trials": 2, "score": 0.5, "score_fp16": 1.0, "compression": 4.5}
    record(docs / "results" / "late" / "needles.json", evaluated("needles", rows=[probe, {**probe, "order": 2}]))
    turn = [quality_row(config, turn=at) for at in (1, 2) for config in ("kivi-2", "oscar-2")]
    record(docs / "results" / "late" / "turns.json", evaluated("turns", turns=2, rows=turn))
    assert main(["--docs", str(docs)]) == 0
    page = (docs / "results" / "README.md").read_text()
    assert "![tiny, 64 tokens of t.txt](rivals-tiny.svg)" in page
    assert "| 0.1000, 0.4000 | 4.00 | 1.00 |" in page
    assert "| 4.50x | 50%, 50% | 100%, 100% | 2 | [needles](late/needles.json) |" in page
    assert "2 turns of 64 + 8 tokens, 1 session, `kivi-2`: KL by turn 0.250, 0.250" in page
    drawn = {path.name: path.read_text() for path in (docs / "results").glob("*.svg")}
    assert set(drawn) == {"kl.svg", "rivals-tiny.svg", "rivals-other.svg", "long-tiny.svg"}
    assert "generated tokens" in drawn["long-tiny.svg"]
    assert "oscar-2" in drawn["rivals-other.svg"]
    assert main(["--check", "--docs", str(docs)]) == 0


def test_three_runs_show_their_median_and_distribution(tmp_path: Path) -> None:
    for run, rate in enumerate((20.0, 26.0, 21.0), 1):
        record(tmp_path / "speed" / "decode-64" / f"run-{run}.json", decoded(rate))
        counted = decode(Results(tmp_path).runs("speed")).splitlines()[-1]
        assert f"| {run} | [decode-64](speed/decode-64) |" in counted
        assert ("21.0 (20.0 to 26.0)" in counted) == (run == 3)


def test_prompts_are_said_as_they_were_measured(tmp_path: Path) -> None:
    times = {"first_token_milliseconds": 2300.0, "milliseconds": 2500.0, "cpu_milliseconds": 2400.0}
    ratios = {"first_token_ratio_to_dynamic_cache": 1.35, "ratio_to_dynamic_cache": 1.25}
    rows = [{"context": 1024, "cache": "balanced", **times, **ratios, "cpu_ratio_to_dynamic_cache": 1.3}]
    result = {"weights": "plain", "threads": 1, "isa": "avx2", "rows": rows}
    record(tmp_path / "speed" / "prefill" / "run-1.json", result)
    said = prefill(Results(tmp_path).runs("speed")).splitlines()[-1]
    assert "| 1,024 | plain | 1 | avx2 | `balanced` | 2.30 s | 2.50 s | 1.35 | 1.25 | 1.30 | 1 |" in said
    assert prefill([]) == "No run is recorded."


def test_runs_of_another_commit_or_machine_are_another_row(tmp_path: Path) -> None:
    for run, facts in enumerate(({}, {}, {"commit": "D"}, {"machine": "N"}), 1):
        record(tmp_path / "speed" / "decode-64" / f"run-{run}.json", decoded(20.0), **facts)
    runs = Results(tmp_path).runs("speed")
    assert [len(same.results) for same in runs] == [2, 1, 1]
    assert "| N | C |" in sources(runs)


def test_a_budget_that_is_never_reached_is_said(tmp_path: Path) -> None:
    run = json.loads((DOCS / "results" / "serving" / "elastic" / "run-1.json").read_text())
    record(tmp_path / "serving" / "elastic" / "run-1.json", {**run["result"], "shrink_seconds": None})
    assert "half the budget is reached after | not reached |" in serving(Results(tmp_path).runs("serving"))


def test_a_measurement_names_its_machine_commit_and_command(tmp_path: Path) -> None:
    program = "import pathlib, sys; pathlib.Path(sys.argv[2]).write_text('{\"answer\": 42}')"
    out = tmp_path / "deep" / "run-1.json"
    measure.measure(out, [sys.executable, "-c", program])
    run = json.loads(out.read_text())
    assert run["result"] == {"answer": 42}
    assert run["machine"] == measure.machine()
    assert "cores" in run["machine"]
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", run["commit"])
    assert run["command"].startswith(Path(sys.executable).name + " -c ")
    assert list(out.parent.iterdir()) == [out]


def test_a_command_that_fails_records_nothing(tmp_path: Path) -> None:
    with pytest.raises(measure.subprocess.CalledProcessError):
        measure.measure(tmp_path / "run-1.json", [sys.executable, "-c", "raise SystemExit(3)"])
    assert not (tmp_path / "run-1.json").exists()
