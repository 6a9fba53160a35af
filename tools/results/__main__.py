"""`python -m tools.results` writes the page, the plot and the paper's tables; `--check` exits 1 if they are stale.

A plot is drawn only when its points have changed; that needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.results import paper, plot, rivals, tables
from tools.results.runs import Results

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- written by tools/results -->\n", "<!-- end of what tools/results writes -->\n"


def page(results: Results) -> str:
    """docs/results/README.md."""
    evaluated = results.runs("quality")
    text = [runs for runs in evaluated if runs.first["task"] in ("text", "recall")]
    tasks = [runs for runs in evaluated if runs not in text]
    speed = results.runs("speed")
    kernels = [runs for runs in speed if runs.source == "speed/attention"]
    prefill = [runs for runs in speed if runs.source.startswith("speed/prefill")]
    decode = [runs for runs in speed if runs not in kernels and runs not in prefill]
    serving = results.runs("serving")
    faults = results.runs("faults")
    return f"""# Results

`make results` writes this page from the JSON files beside it. None of the figures is from a GPU. The models are GGUF
files computed in float32: SmolLM2-135M-Instruct (Q4_1) and Gemma 3 270M (Q4_K_M); the speed and serving figures are
SmolLM2's. What was tried and what it gave: [ablations](../ablations.md). The paper's experiments:
[paper](../paper.md#measured). How it is measured: [evaluation](../evaluation.md).

## Quality per byte

![KL over resident bytes](kl.svg)

`make quality TEXT=wikitext2-valid.txt` measures the rows of SmolLM2. Each configuration is compared with full precision
on the same tokens of WikiText-2 (validation, from its beginning). Compression is fp16 bytes over all resident bytes:
residual window, scales, tags and attention statistics included. KL and ΔNLL are in nats per token; ± is the standard
error over documents. These figures repeat with the same kernels, so documents are counted, not runs. Constants were
chosen on other documents, from 0.55 of the text on. Rows of 2026-11-27 are of an earlier calibration, whose costs of
errors counted the first tokens ([what changed](../ablations.md#costs-without-the-first-tokens-2026-12-01)).

{tables.quality(text)}

Other tasks:

{tables.tasks(tasks)}

{tables.sources(evaluated)}

### Rivals of today

`make rivals TEXT=wikitext2-valid.txt` compares methods with the same sinks and the same residual window (`--window`),
so that all have the same exact tokens ([configurations](../evaluation.md#configurations)).

{rivals.rivals(results.runs("rivals"))}

### Long answers

`make late TEXT=wikitext2-valid.txt` measures answers that the model generates itself, sessions of many turns, several
needles at once, and formats that are set at the beginning ([how](../evaluation.md#long-answers)).

{rivals.late(results.runs("late"))}

## Decode speed

`make measure` measures the tables of this section. The value is the median of the runs; the smallest and the largest
follow in brackets where there are at least three runs. All caches of a source decode in one process, one step of each
in turn. A step includes re-quantization and packing. Ratios are of mean steps.

{tables.decode(decode)}

Prompts of a text, each computed at once. Ratios are of times: above 1 is faster than DynamicCache with SDPA.

{tables.prefill(prefill)}

Attention of one layer and one decode step, cold caches (`query heads/KV heads/head_dim`). x is a multiple of the time
of QAQ's kernel:

{tables.attention(kernels)}

{tables.sources(speed)}

## Serving

The whole stack on one machine: Redis, cache service, worker, router. Streams have prompts of 64 tokens, which are
included in the time.

{tables.serving(serving)}

{tables.sources(serving)}

## Faults

`make faults` breaks a stack of real processes while clients stream, one fault at a time ([failures](../failures.md)).
A gap is the longest silence of a stream between a fault and the moment at which everything ran again.

{tables.faults(faults)}

{tables.sources(faults)}
"""


def plotted(results: Results) -> list[rivals.Picture]:
    """All plots; the first is that of the quality table."""
    (baselines,) = (runs for runs in results.runs("quality") if runs.source == "quality/baselines.json")
    title = "SmolLM2-135M, 2,048 tokens of WikiText-2"
    first = rivals.Picture("kl.svg", title, plot.points(baselines.first["rows"]), along=False)
    return [first, *rivals.pictures(results.runs("rivals"), results.runs("late"))]


def with_section(document: str, section: str) -> str:
    """The document with what is between its marks replaced."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or END not in rest:
        raise SystemExit(f"docs/paper.md has lost its marks {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + section + END + after


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.results", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if a file is stale")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder of documents")
    arguments = parser.parse_args(argv)
    docs: Path = arguments.docs
    results = Results(docs / "results")
    written = {
        docs / "results" / "README.md": page(results),
        docs / "paper.md": with_section((docs / "paper.md").read_text("utf-8"), paper.section(results.runs("paper"))),
    }
    pictures = {docs / "results" / picture.name: picture for picture in plotted(results)}
    stale = [path for path, text in written.items() if not path.exists() or path.read_text("utf-8") != text]
    stale += [path for path, picture in pictures.items() if not plot.is_current(path, picture.points)]
    problems = [f"no table reads {path.relative_to(docs)}: delete it" for path in sorted(results.unread)]
    if arguments.check:
        problems += [f"{path.relative_to(docs)} is stale: make results" for path in stale]
    else:
        for path in stale:
            if path in written:
                path.write_text(written[path], "utf-8")
            else:
                picture = pictures[path]
                limits = (8, 40) if picture.name == "kl.svg" else None
                plot.draw(path, picture.points, picture.title, limits, picture.along)
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
