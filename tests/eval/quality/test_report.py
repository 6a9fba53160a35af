"""The report: every configuration is on it, and it needs nothing but itself."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from qaq_eval.quality import DocumentResult, EvalResult, plots, summarize, words
from qaq_eval.quality.long import summarize_positions
from qaq_eval.quality.provenance import provenance
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


def ids(svg: ElementTree.Element) -> set[str | None]:
    return {element.get("id") for element in svg.iter()}


def test_texts() -> None:
    parts = [part(config) for config in CONFIGS]
    facts = provenance(["eval", "--text", "/home/me/secret/notes.txt", "--configs", "a,b"])
    page = text_report({"model": "<tiny>", "context": 4, "text": "notes.txt"}, rows(parts), parts, facts)
    # Losses, KL by position, tails, bits of the two configurations that vary them, exceptions.
    assert len(drawn(page)) == 6
    assert all(set(CONFIGS) <= ids(svg) for svg in drawn(page)[:3])
    assert "Bits of paper[attention_window=3] at the end" in page
    assert "Bits of uniform-2" not in page
    assert "&lt;tiny&gt;" in page
    assert "qaq eval --text notes.txt --configs a,b" in page
    assert facts["machine"] in page
    figures = page[page.index("<h2>Figures") : page.index("<h2>KL over bytes")]
    assert all(f"<td>{config}</td><td>14.3%</td><td>7.00x</td>" in figures for config in CONFIGS)
    assert page.count("<th>kl_max_se</th>") == 1


def test_a_page_needs_nothing_but_itself_and_follows_light_and_dark() -> None:
    parts = [part(config) for config in CONFIGS]
    page = text_report({"model": "tiny"}, rows(parts), parts)
    assert not re.search(r"<(script|link|iframe|object)|(src|href)=[\"'](?!#|data:)|url\((?!#)|@import", page)
    assert "color-scheme' content='light dark'" in page
    assert "#000000" not in page
    assert "#ffffff" not in page
    assert len(page) < 400_000


def test_what_it_saves_is_one_session_times_many() -> None:
    parts = [part("balanced@8x")]
    page = text_report({"model": "tiny"}, [summarize(parts, "balanced@8x", 4)], parts)
    # Sums over two steps: 50 of 350 bytes a session.
    assert "<td>50 B <small>of 350 B</small></td><td>500 B <small>of 3.5 KB</small></td>" in page


def test_turns() -> None:
    parts = [part(config, turn) for turn in (1, 2) for config in CONFIGS]
    told = [row for turn in (1, 2) for row in summarize_turn([p for p in parts if p.turn == turn], CONFIGS, 4, turn)]
    page = turns_report({"model": "tiny"}, told, parts[3:])
    assert len(drawn(page)) == 5
    assert "Loss by turn" in page
    figures = page[page.index("<h2>Figures") : page.index("<h2>Loss by turn")]
    assert figures.count("7.00x") == len(CONFIGS)  # of the last turn alone
    assert page.count("<th>turn</th>") == 2


def test_long_answers() -> None:
    parts = [part(config) for config in CONFIGS]
    positions = [each for config in CONFIGS for each in summarize_positions(parts, config, buckets=2)]
    page = long_report({"model": "tiny"}, rows(parts), positions, parts)
    assert set(CONFIGS) <= ids(drawn(page)[1])
    assert page.count("<th>kl_max_se</th>") == 2


def result(config: str, compression: float, kl: float, delta: float = 0.0, error: float = 0.0) -> EvalResult:
    made = summarize([part("x")], "x", 4)
    return replace(
        made, config=config, compression=compression, kl_mean=kl, delta_nll=delta, delta_nll_se=error, top1_agreement=1
    )


def test_words_say_who_is_beaten() -> None:
    small, near, beaten = result("small", 10, 0.01), result("near", 5, 0.001), result("beaten", 4, 0.02)
    assert words.beaten_by(beaten, [small, near, beaten]) == [small, near]
    assert words.summary([small, near, beaten]) == [
        "Of 3 configurations, no other has both fewer bytes and a smaller mean KL than small and near.",
        "beaten is beaten in both by small and near.",
    ]
    assert words.listed(["a"]) == "a"
    assert words.listed(["a", "b", "c"]) == "a, b and c"


def test_words_tell_a_difference_only_where_there_is_one() -> None:
    unclear, worse = result("a", 4, 0.1, delta=0.01, error=0.006), result("b", 4, 0.1, delta=0.1, error=0.01)
    assert "within 2 standard errors" in words.verdict(unclear)
    assert "perplexity rises by 10.5%" in words.verdict(worse)
    assert "25.0% of the bytes of fp16 (4.00x smaller)" in words.verdict(worse)
    assert "At all 2 tokens" in words.verdict(worse)
    assert "At one token in 4 another one" in words.verdict(replace(worse, top1_agreement=0.75))


def test_nothing_is_drawn_of_nothing() -> None:
    still = [part("uniform-2")]
    assert plots.bits(still, "uniform-2") is None
    assert plots.bits(still, "balanced") is None
    assert plots.exceptions(still, ["uniform-2"]) is None


@pytest.mark.parametrize("kl", [0.0, 1e-12])
def test_no_loss_at_all_has_a_place(kl: float) -> None:
    parts = [replace(part("fp16"), kl=[kl, kl], nll=[1.0, 2.0])]
    assert "fp16" in plots.losses([summarize(parts, "fp16", 4)])
