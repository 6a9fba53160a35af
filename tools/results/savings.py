"""`python -m tools.results.savings` writes what `qaq estimate` knows of recorded results, and the table in its page.

`--check` exits 1 if one of them is stale.
"""

from __future__ import annotations

import json
import sys

from services.cli.estimate import estimated
from services.cli.model_size import model_size
from services.cli.savings import cache_room
from services.cli.terminal import size
from tools.results.__main__ import ROOT, with_section

MEASURED = ROOT / "services" / "cli" / "measured.json"
PAGE = ROOT / "docs" / "estimate.md"
RECORDED = ROOT / "docs" / "results" / "quality"
MODELS = {"SmolLM2-135M-Instruct.Q4_1": "SmolLM2 135M", "gemma-3-270m-q4_k_m": "Gemma 3 270M"}
SHOWN = ("Llama 3.1 8B", "Llama 3.1 70B", "Qwen 3 8B", "Qwen 3 32B", "Gemma 3 12B", "Mistral 7B")
CONTEXT, SESSIONS, KL, GPU = 8192, 64, 0.006, 80e9


def measured() -> str:
    """services/cli/measured.json: results of `balanced` on text."""
    rows = []
    for path in sorted(RECORDED.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))["result"]
        if result.get("task") != "text" or not path.stem.removeprefix("gemma-").isdigit():
            continue
        fp16 = 2 * model_size(MODELS[result["model"]]).elements
        rows += [
            {
                "model": MODELS[result["model"]],
                "context": row["context"],
                "kl": round(row["kl_mean"], 5),
                "compression": round(row["compression_asymptotic"], 3),
                "requantize_share": round(row["requantize_bytes_per_token"] / fp16, 4),
            }
            for row in result["rows"]
            if row["config"].startswith("balanced@")
        ]
    return "[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n"


def section() -> str:
    """The table of docs/estimate.md."""
    lines = [
        f"{SESSIONS} sessions of {CONTEXT:,} tokens, a GPU of {size(GPU)}, weights and originals in bfloat16.\nThe "
        f"smallest cache whose KL is at most {KL}, as measured on the model in the last column.",
        "",
        "| model | fp16 | fp8 | QAQ | sessions that fit: fp16, fp8, QAQ | Redis: plain, lossless, int8 | network a "
        "token | measured on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in SHOWN:
        shape = model_size(name)
        assert shape.parameters is not None
        try:
            room = cache_room(GPU, 2 * shape.parameters)
        except ValueError:
            room = None
        facts = estimated(shape, CONTEXT, SESSIONS, "bfloat16", KL, room)
        full, eight, *others = facts["caches"]
        qaq = min(others, key=lambda row: float(row["session_bytes"]))
        fits = "weights do not" if room is None else ", ".join(f"{row['fits']:,}" for row in (full, eight, qaq))
        sizes = " | ".join(size(row["all_bytes"]) for row in (full, eight, qaq))
        redis = ", ".join(map(size, facts["redis_bytes"].values()))
        lines.append(f"| {name} | {sizes} | {fits} | {redis} | {size(qaq['network_bytes'])} | {qaq['measured_on']} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    check = "--check" in (sys.argv[1:] if argv is None else argv)
    stale = []
    for path, make in ((MEASURED, measured), (PAGE, lambda: with_section(PAGE.read_text("utf-8"), section()))):
        text = make()
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(path)
            if not check:
                path.write_text(text, "utf-8")
    if check and stale:
        print("\n".join(f"{path.relative_to(ROOT)} is stale: make results" for path in stale))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
