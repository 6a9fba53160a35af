"""`qaq demo` from beginning to end, and the figures that it writes."""

from __future__ import annotations

import json

import jsonschema
import pytest

from qaq_core.models import default_model_path, load_tokenizer
from services.cli.demo import long_prompt
from services.cli.demo_result import DemoResult, FullPrecision

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
    assert set(SCHEMA["properties"]) == set(DemoResult.model_fields)
    assert set(SCHEMA["required"]) == set(DemoResult.model_fields) - {"prompt_tokens", "full_precision"}
    compared = SCHEMA["$defs"]["full_precision"]
    assert set(compared["required"]) == set(compared["properties"]) == set(FullPrecision.model_fields)


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


def test_full_precision_is_beside_it(figures: dict) -> None:
    full = figures["full_precision"]
    assert full["compared_tokens"] in (figures["tokens"], figures["tokens"] - 1)  # without the end of the text
    assert full["same_tokens"] <= full["compared_tokens"]
    assert 0 < full["kl_mean"] < 0.1
    assert full["top1_agreement"] > 0.9
    # In float32, twice fp16, of all tokens but the last.
    assert 1.9 < full["kv_bytes"] / figures["kv_bytes_fp16"] < 2.1
    assert full["requantized_rows"] >= full["requantized_tokens"] > 0
    assert sum(piece["rows"] for piece in full["passage"]) > 0


def test_the_prompt_is_long() -> None:
    tokens = load_tokenizer(str(default_model_path()))(long_prompt())["input_ids"]
    assert 1500 <= len(tokens) <= 4000


def test_the_schema_refuses_other_objects() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"text": "x"}, SCHEMA)
