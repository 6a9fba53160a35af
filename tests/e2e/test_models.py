"""Several models of one stack over real Ray: added, asked by name, scaled and removed while it runs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qaq_core.models.default_model import default_model_path

from .command import here, qaq, until_nothing_is_left, watched

pytestmark = pytest.mark.ray


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where everything that a test starts keeps its files."""
    with watched() as directory:
        monkeypatch.setenv("TMPDIR", str(directory))
        yield directory


def named(directory: Path, name: str) -> Path:
    """The small model under another name."""
    path = directory / f"{name}.gguf"
    path.symlink_to(default_model_path())
    return path


def done(*arguments: str | Path) -> str:
    told = qaq(*arguments)
    assert told.returncode == 0, told.stderr
    return told.stdout


def status(place: Path) -> dict[str, Any]:
    told = here("status", "--json", place / "status.json")
    assert told.returncode == 0, told.stderr
    found: dict[str, Any] = json.loads((place / "status.json").read_text())
    return found | {"shown": told.stdout}


def workers(found: dict[str, Any]) -> list[str]:
    """The models of the workers."""
    return sorted(worker["model"]["name"] for worker in found["workers"].values())


def test_models_come_answer_and_go(state_directory: Path, place: Path, tmp_path: Path) -> None:
    two, three = named(tmp_path, "two"), named(tmp_path, "three")
    first = default_model_path().stem
    try:
        done("up", "--port", "0", "--preset", "fp16", "--model", default_model_path(), "--model", two)
        assert workers(status(tmp_path)) == sorted([first, "two"])
        assert "three is served." in done("models", "add", three, "--preset", "balanced")
        taken = qaq("models", "add", three)
        assert (taken.returncode, 'serves "three" already' in taken.stderr) == (1, True)
        listed = done("models")
        assert f"{first} (default)" in listed
        assert re.search(r"\btwo\b", listed)
        assert re.search(r"\bthree\b", listed)
        asked = ("--max-new-tokens", "8", "--temperature", "0")
        assert "Paris" in done("generate", "The capital of France is", "--model", "three", *asked)
        unknown = qaq("generate", "Hi", "--model", "four")
        assert (unknown.returncode, 'model "four" is not served here' in unknown.stderr) == (1, True)
        done("scale", "--model", "three", "--workers", "2")
        found = status(tmp_path)
        assert workers(found) == sorted([first, "two", "three", "three"])
        assert re.search(r"three: \d running", found["shown"])
        a_removed_model_ends_its_streams()
        found = status(tmp_path)
        assert workers(found) == sorted([first, "two"])
        gone = qaq("generate", "Hi", "--model", "three")
        assert (gone.returncode, 'model "three" is not served here' in gone.stderr) == (1, True)
        done("generate", "Hi", "--model", "two", "--max-new-tokens", "2")
        done("models", "remove", "two")
        alone = qaq("models", "remove", first)
        assert (alone.returncode, "is the only model of the stack" in alone.stderr) == (1, True)
    finally:
        stopped = qaq("down")
    assert stopped.returncode == 0, stopped.stderr
    until_nothing_is_left(place)


def a_removed_model_ends_its_streams() -> None:
    """A stream that runs when its model is removed has all of its tokens."""
    said: list[str] = []

    def generate() -> None:
        asked = ("--max-new-tokens", "200", "--ignore-eos", "--temperature", "0")
        told = qaq("generate", "Once upon a time", "--model", "three", *asked)
        said.append(told.stderr if told.returncode else "whole")

    stream = threading.Thread(target=generate)
    stream.start()
    until_one_runs()
    done("models", "remove", "three")
    stream.join()
    assert said == ["whole"]


def until_one_runs() -> None:
    for _ in range(200):
        if re.search(r"three: 1 running", here("status").stdout):
            return
    raise AssertionError("nothing runs")
