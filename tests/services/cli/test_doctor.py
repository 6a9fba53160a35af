"""`qaq doctor` in this process: what it finds, and when it says that something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from qaq_core import kernels
from qaq_core.calibration import calibration
from qaq_core.kernels import choice
from qaq_core.kernels import library as native
from services.cli.main import app
from services.common.embedded_redis import EmbeddedRedis

SCHEMA = json.loads((Path(__file__).parents[3] / "services" / "schemas" / "doctor.json").read_text())


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("QAQ_KERNEL", "QAQ_REDIS_URL", "QAQ_MODEL", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QAQ_CACHE_DIR", str(tmp_path / "cache"))


def diagnosed(tmp_path: Path, *arguments: str, exit_code: int = 0) -> dict[str, dict[str, Any]]:
    """Findings by name."""
    path = tmp_path / "doctor.json"
    shown = CliRunner().invoke(app, ["doctor", *arguments, "--json", str(path)], catch_exceptions=False)
    assert shown.exit_code == exit_code, shown.output
    told = json.loads(path.read_text())
    jsonschema.validate(told, SCHEMA)
    assert told["ok"] is (exit_code == 0)
    return {finding["name"]: finding for finding in told["findings"]}


def test_a_machine_that_works(tmp_path: Path, model_path: Path) -> None:
    found = diagnosed(tmp_path)
    assert found["model"]["found"].endswith(str(model_path))
    assert found["calibration"]["state"] == "ok"
    assert "qaq up starts" in found["Redis"]["found"]
    assert "torch" in found["versions"]["found"]
    if native.load_library() is not None:
        assert found["kernel"]["found"].startswith("cpu (")
        assert found["C++ library"]["state"] == "ok"
    assert {"extra eval", "extra serve", "extra triton"} <= found.keys()
    assert not (tmp_path / "cache").exists()


def test_an_empty_address_of_redis_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_REDIS_URL", "")
    assert "qaq up starts" in diagnosed(tmp_path)["Redis"]["found"]


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "load_library", lambda: None)
    monkeypatch.setattr(kernels, "load_library", lambda: None)
    monkeypatch.setattr(native, "_load", lambda: (None, "it is not built: install a C++ compiler"))
    found = diagnosed(tmp_path)
    for name in ("kernel", "C++ library"):
        assert found[name]["state"] == "better"
        assert "compiler" in found[name]["advice"]
    assert found["kernel"]["found"].startswith("reference on cpu")


def test_a_slow_kernel_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_KERNEL", "reference")
    found = diagnosed(tmp_path)["kernel"]
    assert (found["state"], "unset QAQ_KERNEL" in found["advice"]) == ("better", True)


@pytest.mark.parametrize(
    ("variable", "value", "name", "word"),
    [
        ("QAQ_KERNEL", "quick", "kernel", "quick"),
        ("QAQ_REDIS_URL", "redis://:secret@127.0.0.1:1/0", "Redis", "does not answer"),
        ("QAQ_REDIS_URL", "nonsense", "Redis", "redis://"),
        ("QAQ_MODEL", "/nowhere/model.gguf", "model", "not there"),
        ("QAQ_PAGE_TOKENS", "many", "QAQ_PAGE_TOKENS", "valid integer"),
        ("QAQ_REQUANTIZE_WAIT", "secret", "QAQ_REQUANTIZE_WAIT", "boolean"),
    ],
)
def test_what_was_asked_for_and_cannot_work(
    variable: str, value: str, name: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    found = diagnosed(tmp_path, exit_code=1)
    assert found[name]["state"] == "wrong"
    assert word in found[name]["advice"]
    assert "secret" not in json.dumps(found)
    assert [one for one, finding in found.items() if finding["state"] == "wrong"] == [name]


def test_a_variable_that_is_misspelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert diagnosed(tmp_path)["variables"]["found"] == "QAQ_CACHE_DIR"
    monkeypatch.setenv("QAQ_PRESSET", "paper")
    found = diagnosed(tmp_path)
    assert "variables" not in found
    assert found["QAQ_PRESSET"]["state"] == "better"
    assert "did you mean QAQ_PRESET?" in found["QAQ_PRESSET"]["advice"]


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    assert "take cpu" in diagnosed(tmp_path, "--device", "cuda:7", exit_code=1)["kernel"]["advice"]


def test_a_redis_that_answers(tmp_path: Path, redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_REDIS_URL", redis_server.url)
    found = diagnosed(tmp_path)["Redis"]
    assert found["state"] == "ok"
    assert "configured" in found["found"]


def test_a_model_that_was_never_measured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({}, tmp_path / "model.safetensors")
    found = diagnosed(tmp_path, "--model", str(tmp_path))
    assert found["model"]["state"] == "ok"
    assert "qaq calibrate" in found["calibration"]["advice"]


def test_a_damaged_calibration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({}, tmp_path / "model.safetensors")
    from qaq_core.models import find_checkpoint

    path = calibration.cached_at(find_checkpoint(str(tmp_path)).fingerprint())
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no table")
    found = diagnosed(tmp_path, "--model", str(tmp_path), exit_code=1)
    assert str(path) in found["calibration"]["advice"]
