"""`qaq demo` from beginning to end, and the figures that it writes."""

from __future__ import annotations

import json

import jsonschema
import pytest

from qaq_core.models import default_model_path, load_tokenizer
from services.cli.demo import DemoResult, long_prompt

from .command import ROOT, left, qaq, watched

pytestmark = pytest.mark.ray

SCHEMA = json.loads((ROOT / "services" / "schemas" / "demo.json").read_text())


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of one run with fewer tokens than the default."""
    path = tmp_path_factory.mktemp("demo") / "demo.json"
    with watched() as place:
        shown = qaq("demo", "--max-new-tokens", "64", "--json", path, TMPDIR=str(place))
        assert shown.returncode == 0, shown.stderr
        assert left(place) == []
    figures = json.loads(path.read_text())
    assert " ".join(figures["text"].split()[:5]) in " ".join(shown.stdout.split())
    assert figures["redis_server"] in shown.stdout
    return figures


def test_the_figures_are_as_their_schema_says(figures: dict) -> None:
    jsonschema.validate(figures, SCHEMA)
    assert set(SCHEMA["required"]) == set(DemoResult.model_fields)


def test_the_cache_is_small_and_went_back_to_its_originals(figures: dict) -> None:
    assert figures["compression"] == pytest.approx(figures["kv_bytes_fp16"] / figures["kv_bytes"])
    assert figures["compression"] >= 5
    assert figures["exceptions"] > 0
    assert figures["rows_requantized"] > 0
    assert figures["requantize_bytes"] > 0
    # At least 1,500 tokens of 30 layers, keys and values, 3 heads, 64 dims, 4 bytes each.
    assert figures["originals_bytes_in_redis"] > 1500 * 30 * 2 * 3 * 64 * 4
    for side in ("key", "value"):
        assert sum(figures["bits_histogram"][side].values()) >= 1500 * 30 * 3


def test_the_prompt_is_long() -> None:
    tokens = load_tokenizer(str(default_model_path()))(long_prompt())["input_ids"]
    assert 1500 <= len(tokens) <= 4000


def test_the_schema_refuses_other_objects() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"text": "x"}, SCHEMA)
