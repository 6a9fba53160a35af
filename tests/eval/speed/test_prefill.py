"""Speed of prompts: every cache computes each of them, and what is said of it was measured."""

from __future__ import annotations

import pytest

from qaq_core.base.errors import ConfigError
from qaq_eval.speed.prefill import prefill_speed
from tests.core.tiny_models import tiny, token_ids


def test_every_cache_computes_every_prompt() -> None:
    said: list[str] = []
    ids = token_ids(90)
    rows = prefill_speed(
        tiny("llama-gqa"), None, ids, [40, 90], 2, ["fp16", "fp16/reference"], lambda what, _: said.append(what)
    )
    names = ["dynamic", "fp16", "fp16/reference"]
    assert [(row.context, row.cache) for row in rows] == [(n, name) for n in (40, 90) for name in names]
    assert said == [f"{n} tokens: {name}" for n in (40, 90) for _ in range(2) for name in names]
    for row in rows:
        assert row.milliseconds >= row.first_token_milliseconds > 0
        assert row.cpu_milliseconds > 0
        if row.cache == "dynamic":
            assert (row.ratio_to_dynamic_cache, row.first_token_ratio_to_dynamic_cache) == (1.0, 1.0)


@pytest.mark.parametrize("contexts", [[0], [30, 91]])
def test_a_prompt_is_no_longer_than_the_text(contexts: list[int]) -> None:
    with pytest.raises(ConfigError, match="1 to 90 tokens"):
        prefill_speed(tiny("llama-gqa"), None, token_ids(90), contexts, 1, ["fp16"])
