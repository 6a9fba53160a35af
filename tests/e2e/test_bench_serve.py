"""`qaq bench serve` against a running stack."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from services.common.certificates import files

from .command import qaq
from .composed import ROOT, Composed

SCHEMA = json.loads((ROOT / "qaq_eval" / "schemas" / "bench_serve.json").read_text())
SMALL = ("--streams", "2", "--stream-tokens", "2", "--memory-sessions", "15")


def bench(composed: Composed, path: Path, *options: str | Path) -> dict:
    router = composed.addresses["router"]
    ca, cert, key = map(str, files(composed.secrets, "router"))  # it calls the worker as a router does
    who = {"QAQ_TLS_CA": ca, "QAQ_TLS_CERT": cert, "QAQ_TLS_KEY": key, "QAQ_REDIS_URL": composed.redis_url("operator")}
    who |= {"QAQ_API_KEY": composed.key}
    result = qaq("bench", "serve", "--router", router, "--json", path, *options, **who)
    assert result.returncode == 0, result.stderr
    assert "first token" in result.stdout
    figures = json.loads(path.read_text())
    jsonschema.validate(figures, SCHEMA)
    return figures


def test_a_mix(composed: Composed, tmp_path: Path) -> None:
    figures = bench(composed, tmp_path / "mix.json", "--clients", "2", "--requests", "2", "--seed", "24", *SMALL)
    assert (figures["clients"], figures["requests"], figures["errors"]) == (2, 2, {})
    assert figures["kv_bytes_peak"] > 0
    assert figures["streams"]["streams"] == 2
    kinds = [process["process"].partition(" ")[0] for process in figures["memory"]["processes"]]
    assert kinds == ["gateway", "originals", "router", "worker"]
    assert figures["router"]["inside_ms"] > 0
    for process in figures["memory"]["processes"]:
        assert process["end"] > 10e6
        # A session that stays takes 6 MB of the worker: exact tokens, and originals that are staged.
        assert process["end"] - process["warm"] < 12 * 3e6, process


def test_a_trace(composed: Composed, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"at": 0.0, "session": "a", "prompt_tokens": 20, "new_tokens": 4, "shared": "s", "shared_tokens": 32},
        {"at": 0.2, "prompt": "Hello", "new_tokens": 4},
        {"at": 0.3, "session": "a", "prompt": " And now?", "new_tokens": 4},
        {"at": 0.4, "prompt_tokens": 100_000, "new_tokens": 1},
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = bench(
        composed,
        tmp_path / "trace.json",
        "--trace",
        trace,
        "--streams",
        "0",
        "--stream-tokens",
        "2",
        "--memory-sessions",
        "0",
    )
    assert (figures["clients"], figures["requests"], figures["sessions"]) == (None, 4, 1)
    assert figures["errors"] == {"INVALID_ARGUMENT": 1}
    assert figures["streams"] is figures["memory"] is None


def test_the_schema_refuses_other_objects() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"requests": 1}, SCHEMA)
