"""A text never has fewer tokens than is said; of tokenizers that lose bytes nothing is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qaq_core.models import load_tokenizer
from services.router.least_tokens import LeastTokens

BYTES = list(bytes_to_unicode().values())
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(**more: Any) -> Tokenizer:
    """Bytes, and "ab" and "abab"."""
    vocab = {token: place for place, token in enumerate([*BYTES, "ab", "abab"])}
    made = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "ab")], **more))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return made


def fallback() -> Tokenizer:
    vocab = {token: place for place, token in enumerate(["<unk>", *FALLBACK, "a", "b", "▁", "ab", "▁▁"])}
    made = Tokenizer(models.BPE(vocab, [("a", "b"), ("▁", "▁")], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.ByteFallback()
    return made


def least(tokenizer: Tokenizer) -> LeastTokens:
    return LeastTokens(SimpleNamespace(backend_tokenizer=tokenizer))


def composing() -> Tokenizer:
    made = byte_level()
    made.normalizer = normalizers.NFC()
    return made


MADE = {"byte level": byte_level(), "byte fallback": fallback(), "composing": composing()}
TEXTS = st.one_of(
    st.text(), st.text("ab "), st.text("e\u0301\u0308u\u1100\u1161\u11a8"), st.sampled_from(["abab" * 50])
)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=150)
@given(text=TEXTS)
def test_never_more_than_there_are(name: str, text: str) -> None:
    tokenizer = MADE[name]
    assert least(tokenizer).of(text) <= len(tokenizer.encode(text).ids)


def test_it_is_sharp() -> None:
    assert least(byte_level()).of("abab" * 50) == 50
    assert least(fallback()).of("x" * 70) == 12  # "▁▁" is six bytes, "<0x00>" as it is written too


@pytest.mark.parametrize(
    "change",
    [
        lambda made: setattr(made, "normalizer", normalizers.Strip()),
        lambda made: setattr(made, "normalizer", normalizers.Replace("ab", "x")),
        lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda made: setattr(
            made,
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), made.pre_tokenizer]),
        ),
        lambda made: made.add_special_tokens([AddedToken("<mask>", lstrip=True)]),
        lambda made: made.enable_truncation(4),
        lambda made: setattr(made, "model", models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        lambda made: setattr(made, "model", models.BPE({"a": 0}, [], unk_token="a", fuse_unk=True)),
    ],
)
def test_of_tokenizers_that_may_lose_bytes_nothing_is_known(change: Any) -> None:
    made = byte_level()
    change(made)
    assert least(made).of("x" * 10**6) == 0


def test_the_demo_model_knows(model_path: Path) -> None:
    tokenizer = load_tokenizer(str(model_path))
    known = LeastTokens(tokenizer)
    longest = max(map(len, json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]))
    assert known.of("x" * longest * 1000) == 1000
    for text in ("Once upon a time", " " * 3000, "\n" * 500, "日本語", "<|im_start|>" * 20, "\x06x" * 500):
        assert 0 < known.of(text) <= len(tokenizer(text)["input_ids"])
    dropped = "\x06" * 1000  # its vocabulary lacks some bytes
    assert known.of(dropped) == len(tokenizer(dropped)["input_ids"]) == 0


def test_a_tokenizer_without_a_backend() -> None:
    assert LeastTokens(object()).of("x" * 10**6) == 0
