"""The report: every configuration is on it, and it needs nothing but itself."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from qaq_eval.quality import DocumentResult, EvalResult, plots, summarize
from qaq_eval.quality.long import summarize_positions
from qaq_eval.quality.report import long_report, text_report, turns_report
from qaq_eval.quality.turns import summarize_turn

EVEN = [[16.0, 2.0, 2.0, 16.0]] * 3
UNEVEN = [[16.0, 1.0, 3.0, 16.0], [16.0, 2.0, 2.5, 16.0], [16.0, 4.0, 0.5, 16.0]]
CONFIGS = ["balanced@8x", "uniform-2", "paper[attention_window=3]"]


def part(config: str, turn: int = 0) -> DocumentResult:
    moving = config != "uniform-2"
    return DocumentResult(
        document=0,
        config=config,
        nll_full=[1.0, 2.0],
        nll=[1.1, 2.2],
        kl=[0.1, 0.2],
        agreed=1,
        resident_bytes=100,
        fp16_bytes=700,
        packed_bytes=80,
        packed_fp16_bytes=450,
        bits_key=2.0,
        bits_value=2.0,
        exceptions=3 if moving else 0,
        requantize_bytes=10,
        turn=turn,
        exceptions_at=[1, 2] if moving else [0, 0],
        map_key=UNEVEN if moving else EVEN,
        map_value=UNEVEN if moving else EVEN,
    )


def rows(parts: list[DocumentResult]) -> list[EvalResult]:
    return [summarize(parts, config, 4) for config in CONFIGS]


def drawn(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_texts() -> None:
    parts = [part(config) for config in CONFIGS]
    page = text_report({"model": "<tiny>", "context": 4}, rows(parts), parts)
    # Losses, bits of the two configurations that vary them, exceptions.
    assert len(drawn(page)) == 4
    assert "Bits of paper[attention_window=3] at the end" in page
    assert "Bits of uniform-2" not in page
    assert "&lt;tiny&gt;" in page
    assert not re.search(r"<(script|link|img)|(src|href)=[\"']https?:", page)
    losses = drawn(page)[0]
    assert {config for config in CONFIGS if any(e.get("id") == config for e in losses.iter())} == set(CONFIGS)
    figures = page[page.index("<table>") :]
    assert all(f"<td>{config}</td>" in figures for config in CONFIGS)
    assert figures.count("<td>7</td>") == 3  # their compression


def test_turns() -> None:
    parts = [part(config, turn) for turn in (1, 2) for config in CONFIGS]
    told = [row for turn in (1, 2) for row in summarize_turn([p for p in parts if p.turn == turn], CONFIGS, 4, turn)]
    page = turns_report({"model": "tiny"}, told, parts[3:])
    assert len(drawn(page)) == 4
    assert "Loss by turn" in page


def test_long_answers() -> None:
    parts = [part(config) for config in CONFIGS]
    positions = [each for config in CONFIGS for each in summarize_positions(parts, config, buckets=2)]
    page = long_report({"model": "tiny"}, rows(parts), positions, parts)
    along = drawn(page)[0]
    assert {config for config in CONFIGS if any(e.get("id") == config for e in along.iter())} == set(CONFIGS)
    assert page.count("<th>kl_max_se</th>") == 2


def test_nothing_is_drawn_of_nothing() -> None:
    still = [part("uniform-2")]
    assert plots.bits(still, "uniform-2") is None
    assert plots.bits(still, "balanced") is None
    assert plots.exceptions(still, ["uniform-2"]) is None


@pytest.mark.parametrize("kl", [0.0, 1e-12])
def test_no_loss_at_all_has_a_place(kl: float) -> None:
    parts = [replace(part("fp16"), kl=[kl, kl], nll=[1.0, 2.0])]
    assert "fp16" in plots.losses([summarize(parts, "fp16", 4)])
