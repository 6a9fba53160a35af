"""The router's process: it tokenizes as transformers does, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qaq_core.base.errors import ModelLoadError
from qaq_core.models import load_tokenizer

from .conftest import ROOT

TEXTS = [
    "The capital of France is",
    "Grüße, 世界! 🙂\n\tdef f(x): return x",
    "<|im_start|>user\nspecial tokens<|im_end|>",
    "",
    "  spaces   and\r\nlines\n\n",
]
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CHATS: list[dict[str, Any]] = [
    {"conversation": [{"role": "user", "content": "Name a colour."}]},
    {
        "conversation": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "Another?"},
        ]
    },
    {"conversation": [{"role": "user", "content": "1 + 1?"}], "tools": [TOOL]},
]

CODE = """
import json, sys
import services.router.server
from qaq_core.models import avoid_torch, load_tokenizer
avoid_torch()
tokenizer = load_tokenizer(sys.argv[1])
asked = json.loads(sys.argv[2])
with open("/proc/self/status") as file:
    memory = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
print(json.dumps({
    "text": [tokenizer(text)["input_ids"] for text in asked["texts"]],
    "plain": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked["texts"]],
    "chats": [
        tokenizer.apply_chat_template(**chat, tokenize=False, add_generation_prompt=True) for chat in asked["chats"]
    ],
    "special": tokenizer.all_special_ids,
    "torch": "torch" in sys.modules,
    "kb": memory,
}))
"""


def tokenized(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    asked = json.dumps({"texts": TEXTS, "chats": CHATS})
    return subprocess.run(
        [sys.executable, "-c", CODE, str(source), asked],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")])} | environment,
        capture_output=True,
        text=True,
    )


def same_as_transformers(said: dict[str, Any], tokenizer: Any) -> None:
    assert said["text"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert said["plain"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert said["chats"] == [
        tokenizer.apply_chat_template(**chat, tokenize=False, add_generation_prompt=True) for chat in CHATS
    ]
    assert said["special"] == tokenizer.all_special_ids


@pytest.mark.slow
def test_tokens_of_a_gguf_file_without_torch(model_path: Path) -> None:
    result = tokenized(model_path)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert not said["torch"]
    assert said["kb"] < 200_000
    same_as_transformers(said, AutoTokenizer.from_pretrained(model_path.parent, gguf_file=model_path.name))


@pytest.mark.slow
def test_a_gguf_file_that_was_never_converted(model_path: Path, tmp_path: Path) -> None:
    """Conversion imports torch, in a process of its own."""
    result = tokenized(model_path, QAQ_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert not said["torch"]
    same_as_transformers(said, load_tokenizer(str(model_path)))


@pytest.mark.slow
def test_tokens_of_a_directory_without_torch(model_path: Path, tmp_path: Path) -> None:
    load_tokenizer(str(model_path)).save_pretrained(tmp_path)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = tokenized(tmp_path)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert not said["torch"]
    same_as_transformers(said, AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.slow
def test_a_damaged_file_is_told_as_with_torch(model_path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "cut.gguf"
    with model_path.open("rb") as whole:
        damaged.write_bytes(whole.read(50_000))
    with pytest.raises(ModelLoadError) as told:
        load_tokenizer(str(damaged))
    result = tokenized(damaged, QAQ_CACHE_DIR=str(tmp_path))
    assert result.returncode == 1
    assert str(told.value) in result.stderr
