"""What `qaq demo` shows: the same facts with and without a terminal, colours and Unicode, in 80 columns too."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from services.cli import demo_page
from services.cli.demo_result import DemoResult, FullPrecision, Piece

ANSWER = 'The "with" statement wraps a block, and its context manager is entered before it.'
RESULT = DemoResult(
    text=ANSWER,
    tokens=20,
    tokens_per_second=21.37,
    ttft_ms=4321,
    kv_bytes=7_000_000,
    kv_bytes_fp16=42_000_000,
    compression=6.0,
    bits_histogram={"key": {"0": 20, "1.5": 60, "16": 20}, "value": {"2": 90, "4": 10}},
    exceptions=1234,
    rows_requantized=1200,
    requantize_bytes=56_000,
    staging_bytes=0,
    originals_bytes_in_redis=84_000_000,
    redis_server="redis-server 6.2.14 (embedded)",
    prompt_tokens=1800,
    full_precision=None,
)
SAME = FullPrecision(
    text=ANSWER,
    tokens=20,
    compared_tokens=20,
    same_tokens=20,
    first_difference=None,
    kl_mean=0.0021,
    kl_p99=0.018,
    kl_max=0.04,
    top1_agreement=0.95,
    kv_bytes=84_000_000,
    repeated_tokens=20,
    requantized_tokens=700,
    requantized_rows=1200,
    passage=[Piece(text=" the", rows=9), Piece(text=" [manager]", rows=8), Piece(text=" is", rows=1)],
)
OTHER = SAME.model_copy(update={"text": 'The "with" statement opens a file.', "same_tokens": 4, "first_difference": 4})


def shown(full: FullPrecision, **how: Any) -> str:
    file: Any = io.TextIOWrapper(io.BytesIO(), encoding=how.pop("encoding", "utf-8"))
    console = Console(file=file, **{"width": 80} | how)
    console.print(demo_page.cache_figures(RESULT, console), highlight=False)
    console.print(demo_page.comparison(RESULT, full, console), highlight=False)
    file.seek(0)
    return str(file.read())


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for full in (SAME, OTHER):
        assert max(map(len, shown(full, width=width).splitlines())) <= width


def test_the_figures_are_there() -> None:
    text = flat(shown(SAME, width=120))
    for fact in (
        "21.4 tokens/s, the first after 4.32 s",
        "42.0 MB",
        "7.0 MB, 6.00x smaller",
        "mean 4.1; 20% have none, 20% have 4 or more",
        "1,200 vectors got more bits from their originals (56.0 KB), of 1,234 that attention returned to",
        "84.0 MB in redis-server 6.2.14 (embedded)",
        "all 20: full precision gives this answer, word for word",
        "0.0021 nats a token; p99 0.018, largest 0.040 (over the 20 served tokens)",
        "the same at 95.0% of them",
        "1,200 vectors of 700 tokens got more bits",
    ):
        assert fact in text


def test_bars_are_in_proportion() -> None:
    console = Console(width=120)
    fp16, qaq = demo_page.bars([42_000_000, 7_000_000], console)
    assert len(fp16) == len(qaq) == demo_page.LONGEST_BAR
    assert fp16.strip() == "█" * 50
    assert qaq.strip() == "█" * 8
    assert demo_page.bars([0, 0], console)[0].strip() == "█"


def test_a_histogram_has_a_column_for_each_width() -> None:
    columns = demo_page.histogram({"0": 10, "2": 80, "16": 1}, Console(width=80)).split("|")[1]
    assert len(columns) == len(demo_page.WIDTHS)
    assert columns[0] == "▂"
    assert columns[4] == "█"
    assert columns[-1] == "▁"
    assert columns[5] == " "


def test_what_got_more_bits_is_marked_by_colour_or_by_brackets() -> None:
    piped = flat(shown(SAME))
    assert "[[the]] [[[manager]]] is" in piped
    assert "[[in brackets]]" in piped
    coloured = shown(SAME, force_terminal=True, color_system="standard", legacy_windows=False, no_color=False)
    assert "[[" not in coloured
    assert "\x1b[7m the" in coloured
    plain = shown(SAME, force_terminal=True, color_system="standard", legacy_windows=False, no_color=True)
    assert "[[the]]" in flat(plain)


def test_answers_that_part_are_shown_beside_each_other() -> None:
    wide, narrow = shown(OTHER, width=120), shown(OTHER, width=80)
    assert "the first 4 of 20; then the answers part, as below" in flat(wide)
    assert any("QAQ" in line and "full precision" in line for line in wide.splitlines())
    assert not any(" QAQ " in line and " full precision " in line for line in narrow.splitlines() if "─" in line)
    assert "[[opens a file.]]" in flat(wide)


def test_a_terminal_without_unicode_gets_plain_signs() -> None:
    text = shown(SAME, encoding="ascii")
    assert "#####" in text
    assert text.isascii()


def test_the_next_steps_are_commands() -> None:
    text = str(demo_page.next_steps(".venv/bin/qaq"))
    assert ".venv/bin/qaq up --http-port 8000" in text
    assert len(text.splitlines()) == 2
