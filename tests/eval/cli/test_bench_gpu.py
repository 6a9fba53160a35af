"""`qaq bench gpu`: what it refuses, and its check in emulation. What it counts: tests/core/kernels/test_counts.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from qaq_eval.cli.bench_gpu import gpu
from qaq_eval.speed.gpu_check import PARTS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"static": False}, "take one of --static and --check"),
        ({"checked": True}, "take one of --static and --check"),
        ({"static": False, "checked": True, "parts": "machine,speed"}, "'speed' is none of machine, conformance"),
        ({"architectures": "sm_80,sm_70"}, "sm_70 is none of sm_80"),
        ({"head_dims": "128,80"}, "something else than 64"),
    ],
)
def test_what_cannot_be_counted_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(typer.BadParameter, match=said):
        asked(**{"static": True, **given})


def test_without_nvcc_it_says_where_one_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qaq_core.kernels.cuda.build.find_nvcc", lambda: None)
    with pytest.raises(typer.BadParameter, match="no nvcc on PATH, in QAQ_NVCC"):
        asked(static=True)


def test_without_a_gpu_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        asked(checked=True)
    assert "QAQ_KERNEL=cuda: there is no CUDA device" in capsys.readouterr().out


@pytest.fixture
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets in its process, which ends with it."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for a CPU")
    for name in ("QAQ_EMULATE", "QAQ_KERNEL"):
        monkeypatch.setenv(name, "")


@pytest.mark.usefixtures("_emulated")
def test_the_check_runs_to_its_end_emulated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All but what is served, which tests/e2e/test_gpu_check.py has."""
    parts = [name for name in PARTS if name != "served"]
    asked(checked=True, emulated=True, parts=",".join(parts), json_path=tmp_path / "found.json")
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("all parts have passed, emulated")
    tables = json.loads((tmp_path / "found.json").read_text())
    assert [bool(table["rows"]) and not table["failed"] for table in tables] == [True] * len(parts)
    assert all(table["title"].split(",")[0] in shown for table in tables)


@pytest.mark.usefixtures("_emulated")
def test_a_part_that_fails_is_shown_last_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise ValueError("it is broken")

    monkeypatch.setitem(PARTS, "machine", breaks)
    with pytest.raises(typer.Exit):
        asked(checked=True, emulated=True, parts="machine,packing")
    shown = capsys.readouterr().out
    assert "FAILED machine: ValueError: it is broken" in shown.splitlines()[-1]
    assert "tiny: a group in decode" in shown


def asked(**given: Any) -> None:
    """The command, as if it had been typed with these options."""
    settings = {"static": False, "checked": False, "emulated": False, "parts": "", "model": None, "device": "cuda"}
    gpu(**{**settings, "architectures": "sm_90", "head_dims": "128", "json_path": None, **given})  # type: ignore[arg-type]
