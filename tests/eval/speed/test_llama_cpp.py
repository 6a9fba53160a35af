"""llama.cpp as a baseline: it decodes the same tokens of the same model; where it is missing that is said."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_core.models import LoadedModel
from qaq_eval.speed import decode_speed
from qaq_eval.speed.llama_cpp import CACHES, LlamaCpp
from tests.core.tiny_models import tiny, token_ids

installed = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is missing")


def test_where_it_is_missing_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ConfigError, match="pip install llama-cpp-python"):
        decode_speed(tiny("llama-gqa"), None, token_ids(60), 4, ["llama.cpp-f16"])


def test_its_caches_are_known_by_name() -> None:
    with pytest.raises(ConfigError, match=r"llama\.cpp-q5_0.*llama\.cpp-q4_0"):
        decode_speed(tiny("llama-gqa"), None, token_ids(60), 4, ["llama.cpp-q5_0"])


@installed
def test_it_reads_gguf_files_only() -> None:
    with pytest.raises(ConfigError, match="gguf"):
        LlamaCpp("somewhere", "llama.cpp-f16", 1, 64)


@installed
@torch.inference_mode()
def test_it_decodes_the_same_tokens_as_transformers(smollm2: LoadedModel, model_path: Path) -> None:
    ids = smollm2.tokenizer("One, two, three, four, five, six, seven, eight.", return_tensors="pt").input_ids
    ids = torch.cat([ids, ids.roll(-2, 1)])
    want = smollm2.model(ids).logits[:, -1].log_softmax(-1)
    held = []
    for kind in CACHES:
        with LlamaCpp(str(model_path), kind, 2, 64) as decoder:
            decoder.decode(ids[:, :-2])
            for at in (-2, -1):
                got = decoder.decode(ids[:, at:][:, :1]).log_softmax(-1)
            held.append(decoder.nbytes)
        assert (want.exp() * (want - got)).sum(-1).max() < 0.5
    assert held[0] > held[1] > held[2]
