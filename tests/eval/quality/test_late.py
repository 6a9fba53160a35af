"""What is asked late: the sessions hold what they ask for, and each configuration answers from its own cache."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_core.models import LoadedModel
from qaq_eval.quality import Config, builtin_text
from qaq_eval.quality.choices import FULL_PRECISION
from qaq_eval.quality.late import format_sessions, needle_sessions
from qaq_eval.quality.probes import Probe, ProbeAnswer, Session, evaluate_probes, summarize_probes
from tests.core.tiny_models import tiny, token_ids


class _Letters:
    """A tokenizer of tiny models."""

    def decode(self, ids: Any) -> str:
        return " ".join(str(int(i)) for i in ids)


def session(trial: int = 0) -> Session:
    ids = token_ids(140, seed=trial)[0]
    probes = (Probe("a", ids[60:70], ("5",), 6), Probe("b", ids[70:110], ("7", "8"), 6))
    return Session(trial, ids[:60], probes)


def ask(configs: list[str], sessions: list[Session], **settings: Any) -> list[ProbeAnswer]:
    parsed = [Config.parse(text) for text in configs]
    return list(evaluate_probes(tiny("llama-gqa"), "tiny", _Letters(), sessions, parsed, **settings))


def test_half_precision_answers_as_full_precision_does_in_every_turn() -> None:
    answers = ask(["fp16", "uniform-2"], [session()])
    by_config = {
        config: [answer for answer in answers if answer.config == config]
        for config in (FULL_PRECISION, "fp16", "uniform-2")
    }
    assert [len(mine) for mine in by_config.values()] == [2, 2, 2]
    for full, half in zip(by_config[FULL_PRECISION], by_config["fp16"], strict=True):
        assert (full.order, full.name, full.position, full.answer) == (
            half.order,
            half.name,
            half.position,
            half.answer,
        )
    # 60 + 10 tokens before the first answer; its 6, and 40 more, before the second.
    assert [answer.position for answer in by_config["fp16"]] == [70, 116]
    coarse = by_config["uniform-2"][1]
    assert coarse.fp16_bytes / coarse.resident_bytes > 2
    assert session().length == 60 + 16 + 46


def test_full_precision_is_the_models_own() -> None:
    (first, _) = ask([], [session()])
    model, ids = tiny("llama-gqa"), session().prompt.tolist() + session().probes[0].ids.tolist()
    own: list[int] = []
    with torch.no_grad():
        for _ in range(6):
            own.append(int(model(torch.tensor([ids + own])).logits[0, -1].argmax()))
    assert first.answer == _Letters().decode(own)


def test_what_is_known_is_not_asked_again() -> None:
    sessions = [session(0), session(1)]
    answers = ask(["uniform-2"], sessions, done=lambda trial, config: trial == 0 or config == FULL_PRECISION)
    assert [(answer.trial, answer.config) for answer in answers] == [(1, "uniform-2")] * 2


def test_scores() -> None:
    probe = session().probes[1]
    assert [probe.score(text) for text in ("7 and 8", "8", "6")] == [1.0, 0.5, 0.0]
    answers = [
        ProbeAnswer(trial, 0, "a", config, 100 + trial, "", score, 10, 40)
        for trial in (0, 1)
        for config, score in ((FULL_PRECISION, 1.0), ("c", float(trial)))
    ]
    (row,) = summarize_probes(answers, ["c"])
    assert (row.order, row.trials, row.score, row.score_fp16, row.compression) == (1, 2, 0.5, 1.0, 4.0)


def test_needles_are_hidden_in_order_and_asked_for_in_another(smollm2: LoadedModel) -> None:
    sessions = needle_sessions(builtin_text(), smollm2.tokenizer, 1600, 4, trials=3)
    orders = []
    for made in sessions:
        text = smollm2.tokenizer.decode(made.prompt)
        assert made.length == 1600
        codes = [probe.expected[0] for probe in made.probes]
        assert len(set(codes)) == 4
        for probe, code in zip(made.probes, codes, strict=True):
            assert text.count(code) == 2
            assert re.search(f"code of the {probe.name} is {code}", text)
            assert smollm2.tokenizer.decode(probe.ids).endswith(f"The secret code of the {probe.name} is")
        orders.append([sorted(codes, key=text.index).index(code) for code in codes])
    assert orders != [[0, 1, 2, 3]] * 3
    with pytest.raises(ConfigError, match="1 to 8 needles"):
        needle_sessions(builtin_text(), smollm2.tokenizer, 1600, 9, 1)
    with pytest.raises(ConfigError, match="too short for 4 needles"):
        needle_sessions(builtin_text(), smollm2.tokenizer, 900, 4, 1)
    with pytest.raises(ConfigError, match="text is too short"):
        needle_sessions(builtin_text()[:4000], smollm2.tokenizer, 1600, 4, 2)


def test_formats_are_set_once_and_asked_for_after_every_part(smollm2: LoadedModel) -> None:
    (made,) = format_sessions(builtin_text(), smollm2.tokenizer, 1500, 2, trials=1)
    assert made.length <= 1500
    text = smollm2.tokenizer.decode(made.prompt)
    keys, tag = made.probes[0].expected, made.probes[1].expected[0]
    assert [probe.name for probe in made.probes] == ["keys", "tag"] * 2
    for expected in (*keys, tag):
        assert text.count(expected) == 4  # the instruction and three examples
        assert text.rindex(expected) < 1500
    asked = [smollm2.tokenizer.decode(probe.ids) for probe in made.probes]
    assert all(expected not in question for expected in (*keys, tag) for question in asked)
    assert asked[0].endswith("Record of David, 52:")
    assert asked[2].endswith("Record of Emma, 37:")
    assert len(made.probes[2].ids) > 200 > len(made.probes[0].ids)
    with pytest.raises(ConfigError, match="1 to 4 times"):
        format_sessions(builtin_text(), smollm2.tokenizer, 1500, 5, 1)
    with pytest.raises(ConfigError, match="too short for 2 parts"):
        format_sessions(builtin_text(), smollm2.tokenizer, 700, 2, 1)
