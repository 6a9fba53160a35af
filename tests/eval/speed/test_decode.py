"""Decode speed: every cache decodes the same tokens, and what is said of it was measured."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_core.cache.in_time import InTime
from qaq_eval.speed import decode_speed
from tests.core.tiny_models import tiny, token_ids


def test_every_cache_is_timed_and_weighed() -> None:
    model, ids = tiny("llama-gqa"), token_ids(140)
    rows = {row.cache: row for row in decode_speed(model, None, ids, 12, ["fp16", "fp16/reference"])}
    assert list(rows) == ["dynamic", "fp16", "fp16/reference"]
    assert rows["dynamic"].ratio_to_dynamic_cache == 1.0
    shape = model.config
    dense = 140 * shape.num_hidden_layers * 2 * shape.num_key_value_heads * shape.head_dim * 4
    assert rows["dynamic"].kv_bytes == dense
    assert rows["fp16"].kv_bytes == rows["fp16/reference"].kv_bytes > dense / 2
    for row in rows.values():
        assert (row.context, row.batch) == (128, 1)
        assert row.tokens_per_second > 0
        ratio = row.tokens_per_second / rows["dynamic"].tokens_per_second
        assert row.ratio_to_dynamic_cache == pytest.approx(ratio)


def test_exceptions_in_time_are_timed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def end(self: InTime, position: int) -> None:
        nonlocal steps
        steps += 1

    monkeypatch.setattr(InTime, "end", end)
    rows = decode_speed(tiny("llama-gqa"), None, token_ids(140), 12, ["balanced", "balanced-in-time"])
    assert [row.cache for row in rows] == ["dynamic", "balanced", "balanced-in-time"]
    assert steps == 12


def test_decoding_needs_a_prompt_before_it() -> None:
    with pytest.raises(ConfigError, match="no prompt"):
        decode_speed(tiny("llama-gqa"), None, token_ids(12), 12, ["fp16"])


def test_a_batch_decodes_together_and_other_caches_are_timed() -> None:
    model, ids = tiny("llama-gqa"), token_ids(60).repeat(3, 1)
    rows = {row.cache: row for row in decode_speed(model, None, ids, 4, ["fp16", "dynamic-bf16"])}
    assert {row.batch for row in rows.values()} == {3}
    assert rows["dynamic-bf16"].kv_bytes * 2 == rows["dynamic"].kv_bytes
    assert next(model.parameters()).dtype == torch.float32


def test_a_backend_that_is_not_installed_is_named() -> None:
    if importlib.util.find_spec("optimum") is not None:
        pytest.skip("the backend is installed")
    with pytest.raises(ConfigError, match="quanto"):
        decode_speed(tiny("llama-gqa"), None, token_ids(60), 4, ["quanto-int4"])
