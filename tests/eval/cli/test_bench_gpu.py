"""`qaq bench gpu`: what it refuses. What it counts is in tests/core/kernels/test_counts.py."""

from __future__ import annotations

import pytest
import typer

from qaq_eval.cli.bench_gpu import gpu


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"static": False}, "never run on a GPU"),
        ({"architectures": "sm_80,sm_70"}, "sm_70 is none of sm_80"),
        ({"head_dims": "128,80"}, "something else than 64"),
    ],
)
def test_what_cannot_be_counted_is_refused(given: dict[str, object], said: str) -> None:
    settings = {"static": True, "architectures": "sm_90", "head_dims": "128", **given}
    with pytest.raises(typer.BadParameter, match=said):
        gpu(**settings)  # type: ignore[arg-type]


def test_without_nvcc_it_says_where_one_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qaq_core.kernels.cuda.build.find_nvcc", lambda: None)
    with pytest.raises(typer.BadParameter, match="no nvcc on PATH, in QAQ_NVCC"):
        gpu(static=True, architectures="sm_90", head_dims="128")
