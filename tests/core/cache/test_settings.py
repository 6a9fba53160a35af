"""Settings that no preset can use are refused with a sentence, before anything is measured."""

from __future__ import annotations

import pickle
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qaq_core import ConfigError, QAQCache, UnsupportedModelError, make_method
from tests.core.tiny_models import calibration, tiny, token_ids

KIND = "llama-gqa"


def for_model(**settings: Any) -> QAQCache:
    preset = settings.get("preset", "balanced")
    known = {} if preset == "fp16" or "calibration" in settings else {"calibration": calibration(KIND)}
    return QAQCache.for_model(tiny(KIND), **known, **settings)


WRONG: list[tuple[str, str, list[Any]]] = [
    ("balanced", "page_tokens", [0, -1, 1025, 1.5, "32", True, None, float("nan")]),
    ("balanced", "target_bits", [0, -2, 17, "3", True, float("nan"), float("inf"), [3]]),
    ("balanced", "target_compression", [0.5, -4, 33, "8x", True, float("nan")]),
    ("balanced", "target_error", [0, -0.1, 11, "0.01", True, float("nan")]),
    ("balanced", "kernel", ["", "gpu", 1, True]),
    ("balanced", "fingerprint", ["", "../../etc/passwd", 7, b"ab"]),
    ("balanced", "exceptions", [0, 1, "no", None]),
    ("balanced", "rotation", [0, "yes", None]),
    ("balanced", "progress", ["yes", 3, True]),
    ("balanced", "calibration", ["table.safetensors", 3, {}]),
    ("balanced", "originals", ["redis://localhost", 3, object()]),
    ("paper", "codec", ["gaussian", "", 3, None, ["uniform"]]),
    ("paper", "granularity", ["batch", "", 3, None, ["layer"]]),
    ("paper", "outlier_ratio", [-0.1, 1, 1.5, "1%", True, float("nan")]),
    ("paper", "attention_window", [0, -5, 5.5, "5", True, None, 1000]),
    ("paper", "sigma_x", [0, -0.1, "0.02", True, float("nan"), float("inf")]),
    ("paper", "sigma_s", [0, -0.1, "0.002", True, float("nan"), float("inf")]),
    ("paper", "bits", [(0, 8), (5, 4), (1, 9), (1,), (1, 2, 3), 4, "18", (1.5, 4), None]),
    ("paper", "exceptions", [0, "no", None]),
    ("paper", "rotation", [True]),
    ("fp16", "target_bits", [4]),
    ("fp16", "page_tokens", [0, "32"]),
    ("fp16", "sigma_x", [1.0]),
]


@pytest.mark.parametrize(
    ("preset", "name", "value"), [(preset, name, value) for preset, name, values in WRONG for value in values]
)
def test_values_that_do_not_fit_are_refused(preset: str, name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        for_model(preset=preset, **{name: value})
    wrong = "target" if (preset, name) == ("fp16", "target_bits") else "bits" if name == "bits" else name
    assert wrong in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("preset", ["", "best", None, 3, ["balanced"]])
def test_unknown_presets_are_refused(preset: Any) -> None:
    with pytest.raises(ConfigError, match="balanced, paper, fp16"):
        QAQCache.for_model(tiny(KIND), preset=preset)


@pytest.mark.parametrize(
    "settings",
    [
        {"page_tokens": 1},
        {"page_tokens": 1024},
        {"target_bits": 16},
        {"target_compression": 8},
        {"preset": "paper", "attention_window": 1, "sigma_x": 1, "bits": [2, 4]},
        {"preset": "paper", "outlier_ratio": 0},
        {"preset": "fp16", "page_tokens": 7},
    ],
)
def test_values_at_the_limits_are_taken(settings: dict[str, Any]) -> None:
    model = tiny(KIND)
    known = {} if settings.get("preset") == "fp16" else {"calibration": calibration(KIND)}
    cache = QAQCache.for_model(model, **settings, **known)
    model.generate(token_ids(40), past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert cache.stats()[0].tokens == 42


@pytest.mark.parametrize(
    ("model", "error", "sentence"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", ConfigError, "load_model"),
        (Path("model.gguf"), ConfigError, "load_model"),
        (None, ConfigError, "a transformers causal language model is needed"),
        (3, ConfigError, "a transformers causal language model is needed"),
        (SimpleNamespace(model=torch.nn.Linear(2, 2)), ConfigError, "give its attribute model"),
        (torch.nn.Linear(2, 2), UnsupportedModelError, "no model of transformers"),
        (tiny(KIND).model, UnsupportedModelError, "does not generate text"),
    ],
    ids=["hub id", "path", "None", "number", "loaded model", "module", "body"],
)
def test_what_is_no_causal_language_model_is_refused(model: Any, error: type[Exception], sentence: str) -> None:
    for make in (QAQCache.for_model, make_method):
        with pytest.raises(error, match=sentence):
            make(model)


def test_the_calibration_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[3, 1, 80\], and this one has \[3, 2, 32\]"):
        for_model(calibration=calibration("llama-mqa-80"))


def test_a_refused_setting_leaves_the_model_as_it_was() -> None:
    model = tiny(KIND)
    before = model.config._attn_implementation
    with pytest.raises(ConfigError):
        QAQCache.for_model(model, preset="fp16", page_tokens=0)
    assert model.config._attn_implementation == before


def test_pickling_is_refused_with_what_to_do() -> None:
    cache = for_model(preset="fp16")
    with pytest.raises(ConfigError, match="keep the token ids"):
        pickle.dumps(cache)
    with pytest.raises(ConfigError, match="keep the token ids"):
        torch.save(cache, BytesIO())


@pytest.mark.parametrize("arguments", [(), (torch.nn.Linear(2, 2),), ([],)])
def test_a_cache_of_a_model_is_made_by_for_model(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match=r"QAQCache\.for_model\(model\)"):
        QAQCache(*arguments)
