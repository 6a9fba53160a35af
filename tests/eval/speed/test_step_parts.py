"""Where a step's time goes: every part is told apart, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch

from qaq_core import QAQCache
from qaq_core.kernels import load_library
from qaq_eval.speed import decode_speed
from qaq_eval.speed.step_parts import PARTS, REST, StepPart, Stopwatch
from tests.core.tiny_models import tiny, token_ids


@pytest.mark.parametrize("cache", ["fp16", "fp16/reference", "fp16/modules"])
def test_parts_of_a_step_are_told_apart(cache: str) -> None:
    model, attend = tiny("llama-gqa"), QAQCache.attend
    parts: list[StepPart] = []
    decode_speed(model, None, token_ids(60), 4, [cache], profiled=parts)
    assert [row.part for row in parts] == [*PARTS, REST]
    assert {row.cache for row in parts} == {cache}
    calls = {row.part: row.calls for row in parts}
    layers = model.config.num_hidden_layers
    if cache == "fp16/modules":
        assert calls["linear"] == 7 * layers + 1
    elif load_library() is not None:  # those of rows that are the same are one product
        assert calls["linear"] == 4 * layers + 1
    assert calls["attention"] == calls["around attention"] == layers
    assert calls["begin"] == calls["packing and exceptions"] == calls["next token"] == 1
    assert all(row.milliseconds > 0 for row in parts if row.calls)
    assert QAQCache.attend is attend
    assert not any(module._forward_hooks for module in model.modules())


def test_a_part_within_another_is_taken_off_it() -> None:
    watch = Stopwatch()
    busy = torch.randn(200, 200)
    with watch.timing("outer"), watch.timing("inner"):
        for _ in range(20):
            busy @ busy
    assert watch.seconds["inner"] > watch.seconds["outer"]
    assert watch.calls == {"outer": 1, "inner": 1}
