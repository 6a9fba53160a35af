"""A pytest plugin: `generate` makes a QAQCache where it would make a DynamicCache.

What a QAQCache refuses by a sentence is left out of the tests' inputs, so that they show the rest: the testers' masks
pad on the right, and are turned around; attention probabilities are not asked for. How many caches a test has used
is written into the report.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import DynamicCache, GenerationMixin

from qaq_core import QAQCache

_prepare = GenerationMixin._prepare_cache_for_generation
_made = 0


def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *more: Any, **others: Any) -> Any:
    global _made
    given = "past_key_values" in model_kwargs
    result = _prepare(self, generation_config, model_kwargs, *more, **others)
    made = model_kwargs.get("past_key_values")
    if not given and type(made) is DynamicCache:
        cache = QAQCache.for_model(self, preset=os.environ.get("QAQ_PRESET", "fp16"))
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        _made += 1
    return result


GenerationMixin._prepare_cache_for_generation = prepare


def pytest_itemcollected(item: Any) -> None:
    kind = getattr(item, "cls", None)
    inputs = getattr(kind, "prepare_config_and_inputs_for_generate", None)
    if kind is None or inputs is None or "padded_left" in vars(kind):
        return

    def padded_left(self: Any, *args: Any, **kwargs: Any) -> Any:
        config, given = inputs(self, *args, **kwargs)
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            given["attention_mask"] = mask.flip(1)
        return config, given

    kind.prepare_config_and_inputs_for_generate = kind.padded_left = padded_left
    kind.has_attentions = False


@pytest.fixture(autouse=True)
def _counted(record_property: Any) -> Iterator[None]:
    before = _made
    yield
    record_property("caches", _made - before)
