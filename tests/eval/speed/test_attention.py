"""Attention speed: every backend computes the same, is timed, and the command writes what its schema says."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from typer.testing import CliRunner

from qaq_core.base.errors import KernelError
from qaq_core.kernels import load_library
from qaq_eval.speed import attention
from qaq_eval.speed.attention import attention_speed, parse_shapes
from services.cli.main import app

SCHEMA = Path(__file__).parents[3] / "qaq_eval" / "schemas" / "bench_attention.json"


def test_every_backend_attends_to_the_same_numbers() -> None:
    rows = attention_speed((6, 2, 32), 100, repeat=2)
    names = [row.backend for row in rows]
    assert {"qaq/reference", "sdpa-fp32", "sdpa-bf16", "grouped-matmul-bf16", "dequantize-sdpa"} <= set(names)
    for row in rows:
        assert row.error < (1e-3 if row.backend.startswith("qaq") or "fp32" in row.backend else 0.2)
        assert set(row.ratio_to) == set(names) - {row.backend}
    one, other = rows[0], rows[1]
    assert one.ratio_to[other.backend] == pytest.approx(other.microseconds / one.microseconds)


def test_a_call_that_the_kernel_refuses_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    if load_library() is None:
        pytest.skip("the C++ library is not built")
    monkeypatch.setitem(attention.TYPES, torch.float32, 99)  # no type of numbers
    with pytest.raises(KernelError, match="qaq_decode cannot be called like this"):
        attention_speed((4, 2, 32), 64, repeat=1)


def test_the_command_writes_what_its_schema_says(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = CliRunner().invoke(app, ["bench", "attention", "--shapes", "4/2/32/64", "--repeat", "1", "--json", str(out)])
    assert done.exit_code == 0, done.output
    jsonschema.validate(json.loads(out.read_text()), json.loads(SCHEMA.read_text()))


def test_a_shape_that_cannot_be_is_refused() -> None:
    for bad in ("9/3/64", "9/2/64/4096", "9/3/60/4096", "9/3/64/7"):
        with pytest.raises(ValueError, match="/"):
            list(parse_shapes(bad))
