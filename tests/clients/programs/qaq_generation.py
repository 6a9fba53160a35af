"""A pytest plugin: `generate` makes a QAQCache where it would make a DynamicCache."""

import os
from typing import Any

from transformers import DynamicCache, GenerationMixin

from qaq_core import QAQCache

_prepare = GenerationMixin._prepare_cache_for_generation


def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *more: Any, **others: Any) -> Any:
    given = "past_key_values" in model_kwargs
    result = _prepare(self, generation_config, model_kwargs, *more, **others)
    if not given and type(model_kwargs.get("past_key_values")) is DynamicCache:
        model_kwargs["past_key_values"] = QAQCache.for_model(self, preset=os.environ.get("QAQ_PRESET", "fp16"))
    return result


GenerationMixin._prepare_cache_for_generation = prepare
