"""What `qaq demo` shows after the answer: memory as bars, bits, what came back, and full precision beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from services.cli.terminal import size

if TYPE_CHECKING:
    from services.cli.demo_result import DemoResult, FullPrecision, Piece

LONGEST_BAR = 50
BESIDE = 100
"""Columns from which two answers stand side by side."""
WIDTHS = ("0", "0.5", "1", "1.5", "2", "2.5", "3", "3.5", "4", "5", "6", "7", "8", "16")
STEPS, PLAIN_STEPS = "▁▂▃▄▅▆▇█", ".:-=+*%#"


def cache_figures(result: DemoResult, console: Console) -> RenderableType:
    """What the cache did: bytes, bits, exceptions, originals."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column()
    lines.add_row("speed", f"{result.tokens_per_second:.1f} tokens/s, the first after {result.ttft_ms / 1000:.2f} s")
    memory = {"fp16": result.kv_bytes_fp16, "QAQ": result.kv_bytes}
    for (name, count), bar in zip(memory.items(), bars(list(memory.values()), console), strict=True):
        note = f", {result.compression:.2f}x smaller, all bytes counted" if name == "QAQ" else ""
        lines.add_row(f"cache, {name}", f"{bar} {size(count)}{note}")
    for side in ("key", "value"):
        lines.add_row(f"bits of {side}s", f"{histogram(result.bits_histogram[side], console)}")
    lines.add_row(
        "re-quantized",
        f"{result.rows_requantized:,} vectors got more bits from their originals ({size(result.requantize_bytes)}), "
        f"of {result.exceptions:,} that attention returned to",
    )
    lines.add_row(
        "originals",
        f"{size(result.originals_bytes_in_redis)} in {result.redis_server}; {size(result.staging_bytes)} still staged",
    )
    return _titled("What the cache did", lines)


def bars(counts: Sequence[int], console: Console) -> list[str]:
    """A bar for each count, the largest of which fills its space; padded to the same width."""
    width = max(10, min(LONGEST_BAR, console.width - 60))
    block = "█" if unicode(console) else "#"
    return [f"{block * max(1, round(width * count / max(*counts, 1))):<{width}}" for count in counts]


def histogram(counts: Mapping[str, int], console: Console) -> str:
    """A column for each width, from 0 bits to half precision, and what it says in words."""
    total, most = max(sum(counts.values()), 1), max([*counts.values(), 1])
    steps = STEPS if unicode(console) else PLAIN_STEPS
    columns = "".join(
        steps[round((len(steps) - 1) * counts[width] / most)] if counts.get(width) else " " for width in WIDTHS
    )
    mean = sum(float(width) * count for width, count in counts.items()) / total
    none = counts.get("0", 0) / total
    wide = sum(count for width, count in counts.items() if float(width) >= 4) / total
    return f"0 |{columns}| 16   mean {mean:.1f}; {none:.0%} have none, {wide:.0%} have 4 or more"


def comparison(result: DemoResult, full: FullPrecision, console: Console) -> RenderableType:
    """The answer of full precision, and how far the quantized cache is from it."""
    words = Table.grid(padding=(0, 2))
    words.add_column(style="bold", no_wrap=True)
    words.add_column()
    words.add_row("same tokens", _sameness(result, full))
    words.add_row(
        "KL divergence",
        f"{full.kl_mean:.4f} nats a token; p99 {full.kl_p99:.3f}, largest {full.kl_max:.3f} "
        f"(over the {full.compared_tokens} served tokens)",
    )
    words.add_row("most likely token", f"the same at {full.top1_agreement:.1%} of them")
    memory = {"full precision": full.kv_bytes, "QAQ": result.kv_bytes}
    for (name, count), bar in zip(memory.items(), bars(list(memory.values()), console), strict=True):
        words.add_row(f"cache, {name}", f"{bar} {size(count)}{'' if name == 'QAQ' else ', in the type of the model'}")
    if full.repeated_tokens < full.compared_tokens:
        words.add_row(
            "repeatable",
            f"the quantized cache of this process chose the first {full.repeated_tokens} of {full.compared_tokens} "
            "served tokens too; when an exception is answered depends on time",
        )
    parts: list[RenderableType] = [words]
    if full.first_difference is not None:
        parts.append(_answers(result.text, full.text, console))
    parts.append(_passage(full, console))
    return _titled("Beside full precision, in one process", Group(*parts))


def next_steps(command: str) -> RenderableType:
    """Two lines: a server of one's own, and where to look into it."""
    return Text(
        f"Next: `{command} up --http-port 8000` serves OpenAI's API at http://127.0.0.1:8000/v1, and gRPC.\n"
        f"Then http://127.0.0.1:8000/ shows a cache token by token, and `{command} top` the workers."
    )


def unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _sameness(result: DemoResult, full: FullPrecision) -> str:
    if full.first_difference is None:
        return f"all {full.compared_tokens}: full precision gives this answer, word for word"
    return f"the first {full.same_tokens} of {full.compared_tokens}; then the answers part, as below"


def _answers(served: str, full: str, console: Console) -> RenderableType:
    """Both answers; what follows the part that they share is marked."""
    shared = next(
        (i for i, (a, b) in enumerate(zip(served, full, strict=False)) if a != b), min(len(served), len(full))
    )
    panels = []
    for title, text in (("QAQ", served), ("full precision", full)):
        if marks(console):
            shown = Text.assemble((text[:shared], "dim"), (text[shared:], "bold"))
        else:
            shown = Text(f"{text[:shared]}[[{text[shared:]}]]")
        panels.append(Panel(shown, title=title, width=console.width // 2 - 1 if console.width >= BESIDE else None))
    return Columns(panels) if console.width >= BESIDE else Group(*panels)


def _passage(full: FullPrecision, console: Console) -> RenderableType:
    """The passage with the most vectors that got more bits; the tokens they belong to are marked."""
    if not full.passage:
        return Text("No vector got more bits here: attention did not return to what it had left.")
    heading = Text(
        f"{full.requantized_rows:,} vectors of {full.requantized_tokens:,} tokens got more bits while the answer was "
        f"decoded. Where most of them are ({'marked' if marks(console) else '[[in brackets]]'}):"
    )
    return Group(heading, Padding(Text.assemble(*_marked(full.passage, console)), (0, 0, 0, 2)))


def _marked(passage: Sequence[Piece], console: Console) -> Iterator[Text | str]:
    """Tokens with at least half as many vectors as the one with the most are marked."""
    limit = max(piece.rows for piece in passage) / 2
    for piece in passage:
        if piece.rows < limit or not piece.text.strip():
            yield piece.text
        elif marks(console):
            yield Text(piece.text, style="reverse")
        else:
            bare = piece.text.strip()
            yield piece.text.replace(bare, f"[[{bare}]]")


def marks(console: Console) -> bool:
    """Whether parts of a text can be told apart by how they look."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def _titled(title: str, body: RenderableType) -> RenderableType:
    return Group(Text(), Text(title, style="bold underline"), Padding(body, (0, 0, 0, 1)))
