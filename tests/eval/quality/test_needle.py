"""Needles: what is hidden, where, and that full precision of a real model finds it."""

from __future__ import annotations

import re

import pytest

from qaq_core.base.errors import ConfigError
from qaq_core.models import LoadedModel
from qaq_eval.quality import Config, builtin_text
from qaq_eval.quality.choices import FULL_PRECISION
from qaq_eval.quality.needle import DEPTHS, NeedleAnswer, evaluate_needles, make_haystacks, summarize_needles


def test_a_code_is_hidden_at_every_depth(smollm2: LoadedModel) -> None:
    haystacks = make_haystacks(builtin_text(), smollm2.tokenizer, 500, trials=2)
    assert [(h.trial, h.depth) for h in haystacks] == [(trial, depth) for trial in (0, 1) for depth in DEPTHS]
    texts = [smollm2.tokenizer.decode(h.ids) for h in haystacks]
    for haystack, text in zip(haystacks, texts, strict=True):
        assert len(haystack.ids) == 500
        assert re.fullmatch(r"\d{7}", haystack.code)
        assert text.count(haystack.code) == 2
        assert text.endswith("What is the secret code? The secret code is")
        assert text.index(haystack.code) / len(text) == pytest.approx(haystack.depth / 100, abs=0.2)
    places = [text.index(h.code) for h, text in zip(haystacks[:9], texts, strict=False)]
    assert places == sorted(places)
    assert haystacks[0].code != haystacks[9].code
    again = make_haystacks(builtin_text(), smollm2.tokenizer, 500, trials=1)
    assert [h.ids.tolist() for h in again] == [h.ids.tolist() for h in haystacks[:9]]


def test_texts_and_contexts_that_are_too_short(smollm2: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="too short for a needle"):
        make_haystacks(builtin_text(), smollm2.tokenizer, 200, 1)
    with pytest.raises(ConfigError, match="the text ends in trial 2"):
        make_haystacks(builtin_text()[:4000], smollm2.tokenizer, 600, 2)


def test_it_is_found_or_not(smollm2: LoadedModel) -> None:
    """Half precision answers as full precision, word for word; a cache that keeps the last tokens only is lost."""
    haystack = make_haystacks(builtin_text(), smollm2.tokenizer, 420, 1)[4]
    configs = [Config.parse(text) for text in ("fp16", "scissorhands-0.05")]
    found = list(evaluate_needles(smollm2.model, smollm2.fingerprint, smollm2.tokenizer, [haystack], configs))
    full, exact, evicted = found
    assert (full.config, full.found) == (FULL_PRECISION, True)
    assert haystack.code in full.answer
    assert exact.answer == full.answer
    assert not evicted.found
    assert evicted.fp16_bytes / evicted.resident_bytes > 10
    only = evaluate_needles(
        smollm2.model,
        smollm2.fingerprint,
        smollm2.tokenizer,
        [haystack],
        configs,
        lambda _, config: config in (FULL_PRECISION, "fp16"),
    )
    assert [each.config for each in only] == ["scissorhands-0.05"]


def test_rows_are_shares_of_trials() -> None:
    def one(trial: int, config: str, found: bool, resident: int) -> NeedleAnswer:
        return NeedleAnswer(trial, 50, config, "", found, resident, 800)

    found = [
        one(0, FULL_PRECISION, True, 800),
        one(1, FULL_PRECISION, True, 800),
        one(0, "a", True, 100),
        one(1, "a", False, 300),
    ]
    (row,) = summarize_needles(found, ["a"], 99)
    assert (row.config, row.context, row.depth, row.trials) == ("a", 99, 50, 2)
    assert (row.found, row.found_fp16, row.compression) == (0.5, 1.0, 4.0)
