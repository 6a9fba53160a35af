"""Turns of a session: every one is measured on its own, and later ones read what earlier ones left."""

from __future__ import annotations

import pytest
import torch

from qaq_eval.quality import Config, Document, DocumentResult
from qaq_eval.quality.turns import evaluate_turns, summarize_turn
from tests.core.tiny_models import teacher_forced, tiny, token_ids

KIND, TURNS, CONTEXT, DECODE = "llama-gqa", 3, 60, 12
CONFIGS = ("fp16", "uniform-2", "h2o-0.5")


def session(index: int = 0) -> Document:
    tokens = TURNS * (CONTEXT + DECODE)
    return Document(index, token_ids(tokens + 1, seed=index)[0], tokens - DECODE)


@pytest.fixture(scope="module")
def parts() -> list[DocumentResult]:
    configs = [Config.parse(text) for text in CONFIGS]
    return list(evaluate_turns(tiny(KIND), "tiny", [session()], TURNS, configs))


def test_the_baseline_is_the_models_own(parts: list[DocumentResult]) -> None:
    ids = session().ids[None]
    loss = torch.nn.functional.cross_entropy(
        teacher_forced(tiny(KIND), ids[:, :-1], 2)[1:], ids[0, 3:], reduction="none"
    )
    for turn in range(1, TURNS + 1):
        at = turn * (CONTEXT + DECODE) - DECODE - 2
        for part in (part for part in parts if part.turn == turn):
            assert part.nll_full == pytest.approx(loss[at : at + DECODE].tolist(), abs=1e-3)


def test_every_turn_has_a_row(parts: list[DocumentResult]) -> None:
    assert [(part.turn, part.config) for part in parts] == [
        (turn, config) for turn in range(1, TURNS + 1) for config in CONFIGS
    ]
    for turn in range(1, TURNS + 1):
        mine = [part for part in parts if part.turn == turn]
        exact, coarse, evicted = summarize_turn(mine, CONFIGS, CONTEXT, turn)
        assert exact.turn == turn
        assert exact.tokens == DECODE
        assert exact.kl_mean < 1e-3
        assert coarse.kl_mean > 10 * exact.kl_mean
        assert evicted.compression == pytest.approx(2, rel=0.1)
    longer = [
        summarize_turn([part for part in parts if part.turn == turn], CONFIGS, CONTEXT, turn)[1] for turn in (1, 3)
    ]
    assert longer[1].compression > longer[0].compression


def test_sessions_that_are_done_are_left_out() -> None:
    configs = [Config.parse("uniform-2")]
    told = []
    made = evaluate_turns(
        tiny(KIND),
        "tiny",
        [session(0), session(1)],
        TURNS,
        configs,
        lambda i, _, turn: (i, turn) == (0, TURNS),
        lambda what, share: told.append(share),
    )
    assert {part.document for part in made} == {1}
    assert told == sorted(told)
    assert told[-1] == 1
