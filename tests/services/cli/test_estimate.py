"""`qaq estimate`: the figures, its table in the docs, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import PageShape
from services.cli.estimate import byte_count, estimated
from services.cli.main import app
from services.cli.model_size import ModelSize, known_models, model_size
from services.cli.savings import Measured, results_for, savings, stored_token_bytes
from services.originals.page_format import PageFormat, stored_bytes
from services.originals.seals import Seal
from tools.results.savings import main as write_table

SCHEMA = Path(__file__).parents[3] / "services" / "schemas" / "estimate.json"
LLAMA = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
POINTS = ((1024, 0.001, 4.0), (4096, 0.002, 7.0), (4096, 0.008, 10.0))
RESULTS = [Measured("a", *point, requantize_share=0.1) for point in POINTS]


def configured(folder: Path, **facts: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **facts}))
    return str(folder)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, ["estimate", *arguments])
    return result.exit_code, result.output


def test_the_table_of_the_docs_and_the_recorded_results_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_table(["--check"]) == 0, capsys.readouterr().out


def test_llama_8b_by_name() -> None:
    """128 KiB a token at fp16."""
    for name in ("Llama 3.1 8B", "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"):
        assert model_size(name).elements * 2 == 128 << 10
    full, eight, _, tight = savings(model_size("Llama 3.1 8B"), 4096, 10, room=60e9, results=RESULTS)
    assert (full.session_bytes, eight.session_bytes) == (512 << 20, 256 << 20)
    assert full.all_bytes == 10 * full.session_bytes
    assert full.fits == 60 * 10**9 // (512 << 20)
    assert tight.session_bytes == pytest.approx((128 << 10) * (16 + 4080 / 10), abs=1)


def test_layers_with_a_window_hold_the_window_alone() -> None:
    model = ModelSize("m", layers=6, kv_heads=1, head_dim=64, sliding_layers=5, window=512)
    assert model.held_elements(512) == 512 * model.elements
    assert model.held_elements(10_000) == 2 * 64 * (10_000 + 5 * 512)
    assert savings(model, 10_000, 1, results=RESULTS)[2].session_bytes > 2 * model.elements * 10_000 / 7


@pytest.mark.parametrize(
    ("facts", "sliding"),
    [
        ({}, 0),
        ({"sliding_window": 512}, 32),
        ({"sliding_window": 512, "use_sliding_window": False}, 0),
        ({"sliding_window": 512, "max_window_layers": 20}, 12),
        ({"sliding_window": 512, "sliding_window_pattern": 6}, 27),
        ({"sliding_window": 512, "model_type": "gemma3_text"}, 27),
        ({"sliding_window": 512, "layer_types": ["sliding_attention"] * 30 + ["full_attention"] * 2}, 30),
    ],
)
def test_windows_of_a_configuration(tmp_path: Path, facts: dict[str, Any], sliding: int) -> None:
    size = model_size(configured(tmp_path, **facts))
    assert (size.layers, size.kv_heads, size.head_dim, size.sliding_layers) == (32, 8, 128, sliding)


def test_every_model_of_the_table_has_a_source_and_weights() -> None:
    assert len({model.name for model in known_models()}) == len(known_models())
    for model in known_models():
        assert model.source.startswith("https://")
        assert model.parameters
        assert model_size(model.name) == model


def test_a_nested_configuration_with_its_weights(tmp_path: Path) -> None:
    text = {**LLAMA, "head_dim": 64, "intermediate_size": 14_336, "vocab_size": 128_256, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert model_size(str(tmp_path / "config.json")).head_dim == 64
    text["head_dim"] = 128
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert model_size(str(tmp_path)).parameters == pytest.approx(8.03e9, rel=0.01)


def test_results_are_those_of_the_nearest_context_and_exact_enough() -> None:
    assert results_for(100, None, RESULTS) == RESULTS[:1]
    assert results_for(9000, None, RESULTS) == RESULTS[1:]
    assert results_for(9000, 0.005, RESULTS) == RESULTS[1:2]
    with pytest.raises(ConfigError, match=r"the least is 0\.0020"):
        results_for(9000, 0.0001, RESULTS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", ["plain", "int8"])
def test_bytes_in_redis_are_those_of_a_stored_page(form: Any, dtype: str) -> None:
    model, shape = model_size("SmolLM2 135M"), PageShape(30, 3, 32, 64, dtype)
    page = len(PageFormat("", form).pack(bytes(32), shape, Seal(bytes(16), bytes(16)), bytes(shape.nbytes)))
    assert 32 * stored_token_bytes(model, dtype, form) == pytest.approx(page, rel=0.001)
    assert form != "plain" or page == stored_bytes(shape)


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "estimate.json"
    options = ("--context", "8192", "--sessions", "64", "--gpu-memory", "80GB", "--kl", "0.006", "--json", str(path))
    code, out = run("--model", "Qwen 3 8B", *options)
    assert code == 0, out
    assert "36 layers" in out
    written = json.loads(path.read_text())
    jsonschema.validate(written, json.loads(SCHEMA.read_text()))
    due = estimated(model_size("Qwen 3 8B"), 8192, 64, "bfloat16", 0.006, 0.9 * 80e9 - 2 * 8.19e9)
    assert written["caches"] == due["caches"]
    assert {row["measured_on"].split(",")[0] for row in written["caches"][2:]} == {"SmolLM2 135M"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "no such"], "is no model of the table"),
        (["--model", ""], "is no model of the table"),
        (["--model", "/nowhere/config.json"], "is not readable"),
        (["--model", "Qwen 3 8B", "--kl", "1e-9"], "has a KL of at most"),
        (["--model", "Qwen 3 8B", "--dtype", "int3"], "take bfloat16, float16, float32"),
        (["--model", "Qwen 3 8B", "--gpu-memory", "much"], "write it as 80GB"),
        (["--model", "Qwen 3 8B", "--gpu-memory", "8GB"], "do not fit"),
        (["--model", "Qwen 3 8B", "--context", "0"], "--context"),
    ],
)
def test_bad_input_is_answered_by_a_sentence(arguments: list[str], sentence: str) -> None:
    code, out = run(*arguments)
    assert code in (1, 2)
    assert sentence in " ".join(out.split())
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not readable"),
        ("[]", "it holds no object"),
        ("{}", "num_hidden_layers = None"),
        (json.dumps({**LLAMA, "num_key_value_heads": -1}), "num_key_value_heads = -1"),
        (json.dumps({**LLAMA, "kv_lora_rank": 512}), "latent"),
        (json.dumps({**LLAMA, "sliding_window": "wide"}), "sliding_window = 'wide'"),
        (json.dumps({**LLAMA, "layer_types": 3, "sliding_window": 5}), "layer_types"),
        (json.dumps({"text_config": [1]}), "text_config"),
    ],
)
def test_bad_configurations_are_answered_by_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        model_size(str(tmp_path))


def test_weights_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    code, out = run("--model", configured(tmp_path), "--gpu-memory", "80GB")
    assert code == 1
    assert "give --weights" in out
    assert run("--model", configured(tmp_path), "--gpu-memory", "80GB", "--weights", "5GB")[0] == 0


def test_numbers_of_bytes() -> None:
    assert byte_count("80GB", "") == 80e9
    assert byte_count(" 24 GiB", "") == 24 * 2**30
    assert byte_count("1e9", "") == 1e9
