"""Draws docs/pictures from recorded results, and a table of docs/how.md.

`python -m tools.pictures` writes them; `--check` compares and exits 1 on drift.

The pictures are plain SVG that follows light and dark. overview.svg is drawn by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURES = ROOT / "docs" / "results", ROOT / "docs" / "pictures"
RUN = PICTURES / "bits.json"
"""The recorded run of bits.svg."""
HOW = ROOT / "docs" / "how.md"

STYLE = (
    "<style>text{font:13px system-ui,sans-serif;fill:#1b1f24}.dim{fill:#59636e}.bar{fill:#8c959f}.ours{fill:#2a7de1}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.dim{fill:#9198a1}.bar{fill:#656c76}}</style>"
)
Bar = tuple[str, float, str]
"""Name, number, and what is written behind it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on drift")
    check = parser.parse_args().check
    drawn = pictures()
    stale = [path for path, text in drawn.items() if not path.exists() or path.read_text("utf-8") != text]
    for path in stale:
        if check:
            print(f"stale: {path.relative_to(ROOT)}; run python -m tools.pictures")
        else:
            path.write_text(drawn[path], "utf-8")
    return 1 if check and stale else 0


def pictures() -> dict[Path, str]:
    """Every picture, by its path."""
    return {
        PICTURES / "memory.svg": memory(),
        PICTURES / "elastic.svg": elastic(),
        PICTURES / "bits.svg": bits(json.loads(RUN.read_text("utf-8"))),
        HOW: how(HOW.read_text("utf-8"), json.loads(RUN.read_text("utf-8"))),
    }


def how(page: str, run: Any) -> str:
    """The page with the table of the recorded run between its marks."""
    first, last = "<!-- written by tools/pictures.py -->\n", "<!-- end of what tools/pictures.py writes -->"
    before, _, rest = page.partition(first)
    lines = [
        "| | cells below 1 bit | 1 to 2 | 2 to 3 | 3 to 8 | half precision | mean of packed cells |",
        "|---" * 7 + "|",
    ]
    for side in ("key", "value"):
        cells = [width for row in run["result"][f"map_{side}"] for width in row]
        edges = (0.0, 1.0, 2.0, 3.0, 8.001, 17.0)
        shares = [sum(low <= width < high for width in cells) / len(cells) for low, high in pairwise(edges)]
        mean = _mean(run["result"][f"map_{side}"])
        lines.append(f"| {side}s | {' | '.join(f'{share:.0%}' for share in shares)} | {mean:.2f} |")
    return before + first + "\n".join(lines) + "\n" + last + rest.partition(last)[2]


def result(name: str) -> Any:
    return json.loads((RESULTS / name / "run-1.json").read_text("utf-8"))["result"]


def memory() -> str:
    """Bytes of one session of 4,096 tokens in caches that were measured, and the speed of decoding from them."""
    rows = {row["cache"]: row for row in result("speed/decode-4096-llama.cpp")["rows"]}
    rows |= {row["cache"]: row for row in result("speed/decode-4096-quanto")["rows"] if row["cache"] == "quanto-int4"}
    names = {
        "dynamic": "transformers, float32",
        "llama.cpp-f16": "llama.cpp, f16",
        "llama.cpp-q8_0": "llama.cpp, q8_0",
        "quanto-int4": "transformers, quanto int4",
        "balanced": "QAQ, balanced",
    }
    drawn = [(names[name], rows[name]["kv_bytes"] / 1e6, f"{rows[name]['kv_bytes'] / 1e6:.1f} MB") for name in names]
    return bars("Cache of one session, SmolLM2-135M at 4,096 tokens", drawn, "QAQ, balanced")


def elastic() -> str:
    """Many sessions under one budget."""
    found = result("serving/elastic")
    held = found["kv_bytes"] / 1e6
    drawn: list[Bar] = [
        ("at 16 bits", found["kv_bytes_fp16"] / 1e6, f"{found['kv_bytes_fp16'] / 1e6:,.0f} MB"),
        ("budget", found["budget_bytes"] / 1e6, f"{found['budget_bytes'] / 1e6:,.0f} MB"),
        ("held by QAQ", held, f"{held:,.0f} MB, {found['bits']:.2f} bits an element, everything counted"),
    ]
    title = (
        f"{found['sessions']} sessions of {found['context']:,} tokens at once; {found['streams_stopped']} were stopped"
    )
    return bars(title, drawn, "held by QAQ")


def bars(title: str, drawn: Sequence[Bar], ours: str) -> str:
    """Horizontal bars under a title."""
    left, width, row = 190, 300, 30
    most = max(number for _, number, _ in drawn)
    parts = [f"<text x='0' y='18' font-weight='600'>{title}</text>"]
    for i, (name, number, said) in enumerate(drawn):
        y, long = 36 + i * row, max(2.0, width * number / most)
        kind = "ours" if name == ours else "bar"
        parts += [
            f"<text x='{left - 10}' y='{y + 15}' text-anchor='end'>{name}</text>",
            f"<rect class='{kind}' x='{left}' y='{y}' width='{long:.1f}' height='20' rx='2'/>",
            f"<text class='dim' x='{left + long + 8:.1f}' y='{y + 15}'>{said}</text>",
        ]
    return svg(780, 44 + row * len(drawn), parts, title)


def bits(run: Any) -> str:
    """Bits by layer and position, keys beside values, as one recorded evaluation found them."""
    parts = []
    cell, height = 11, 6
    about = run["result"]
    title = f"Bits an element, {about['model']}, {about['config']} at {about['context']:,} + {about['decode']} tokens"
    parts.append(f"<text x='0' y='18' font-weight='600'>{title}</text>")
    for side, name in enumerate(("keys", "values")):
        grid = about["map_key" if side == 0 else "map_value"]
        x0, y0 = side * 390, 48
        parts.append(f"<text class='dim' x='{x0}' y='{y0 - 8}'>{name}: mean {_mean(grid):.1f} bits</text>")
        for layer, row in enumerate(grid):
            y = y0 + (len(grid) - 1 - layer) * height
            place = 0
            for shade, cells in groupby(colour(width) for width in row):
                wide = cell * len(list(cells))
                parts.append(f"<rect x='{x0 + place}' y='{y}' width='{wide}' height='{height}' fill='{shade}'/>")
                place += wide
    bottom = 48 + len(about["map_key"]) * height + 18
    parts.append(f"<text class='dim' x='0' y='{bottom}'>left: first tokens; bottom: first layer</text>")
    for i, width in enumerate((0, 1, 2, 4, 6, 8, 16)):
        parts.append(f"<rect x='{390 + i * 52}' y='{bottom - 12}' width='14' height='14' fill='{colour(width)}'/>")
        parts.append(f"<text class='dim' x='{408 + i * 52}' y='{bottom}'>{width}</text>")
    return svg(780, bottom + 10, parts, title)


def colour(width: float) -> str:
    """Of a mean width, to a quarter of a bit: light where there are few, dark blue at 8, orange for half precision."""
    if width > 8:
        return "#d9822b"
    share = (round(4 * width) / 32) ** 0.6
    ends = ((240, 246, 253), (10, 48, 110))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(*ends, strict=True))


def _mean(grid: Sequence[Sequence[float]]) -> float:
    every = [width for row in grid for width in row if width <= 8]
    return sum(every) / max(1, len(every))


def svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' aria-label='{title}'>"
        f"{STYLE}{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
