"""Tables and lists of figures, in Markdown."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

from tools.results.runs import Json, Runs

MODELS = {"SmolLM2-135M-Instruct.Q4_1": "SmolLM2-135M", "gemma-3-270m-q4_k_m": "Gemma 3 270M"}


def model_name(result: Json) -> str:
    name: str = result["model"]
    return MODELS.get(name, name)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(textwrap.fill(f"- {line}.", 120, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def sources(measured: Sequence[Runs]) -> str:
    """How each source was measured."""
    head = ["source", "runs", "machine", "commit", "date", "command"]
    return table(head, ([runs.link, len(runs.results), *_facts(runs)] for runs in measured))


def _facts(runs: Runs) -> list[str]:
    first = runs.facts[0]
    loads = [facts["load"] for facts in runs.facts if "load" in facts]
    notes = [first["note"]] if "note" in first else []
    if loads:
        notes.append(f"load average before {min(loads):.1f} to {max(loads):.1f}")
    return [first["machine"], first["commit"], first["date"], "; ".join([f"`{first['command']}`", *notes])]


def loss(row: Json) -> str:
    """ΔNLL and its standard error."""
    return f"{row['delta_nll']:+.4f} ± {row['delta_nll_se']:.4f}"


def tails(row: Json) -> Iterator[str]:
    """KL mean, median, 99% quantile and maximum, with the standard errors that the file has."""
    for name, digits in (("kl_mean", 4), ("kl_median", 4), ("kl_p99", 3), ("kl_max", 2)):
        error = f" ± {row[f'{name}_se']:.{digits}f}" if f"{name}_se" in row else ""
        yield f"{row[name]:.{digits}f}{error}" if name in row else "not recorded"


def quality(measured: Sequence[Runs]) -> str:
    """`qaq eval` on text: predictions against full precision, at the bytes that are held."""
    head = ["model", "context", "config", "compression", "bits K/V", "KL mean", "median", "p99", "maximum", "ΔNLL"]
    head += ["top-1", "fetched per token", "documents", "decoded each", "source"]
    return table(head, (cells for runs in sorted(measured, key=_order) for cells in _quality_rows(runs)))


def _order(runs: Runs) -> tuple[bool, bool, bool, int]:
    other_model = not runs.first["model"].startswith("SmolLM2")
    return other_model, runs.first["task"] == "recall", "baselines" in runs.source, runs.first["context"]


def _quality_rows(runs: Runs) -> Iterator[list[object]]:
    passage = " (repeated passage)" if runs.first["task"] == "recall" else ""
    window = f", window {runs.first['window']}" if "window" in runs.first else ""
    for row in runs.first["rows"]:
        yield [
            model_name(runs.first),
            f"{row['context']:,}{passage}{window}",
            f"`{row['config']}`",
            f"{row['compression']:.2f}x",
            f"{row['bits_key']:.1f}/{row['bits_value']:.1f}",
            *tails(row),
            loss(row),
            f"{row['top1_agreement']:.3f}",
            f"{row['requantize_bytes_per_token']:,.0f} B",
            row["documents"],
            runs.first["decode"],
            runs.link,
        ]


def tasks(measured: Sequence[Runs]) -> str:
    """`qaq eval` on multiple choice, needles and turns."""
    lines = {"choice": _choice, "needle": _needle, "turns": turns}
    return bullets(f"{lines[runs.first['task']](runs.first)} ({runs.link})" for runs in measured)


def _choice(result: Json) -> str:
    (row,) = result["rows"]
    return (
        f"Multiple choice, {row['task']}, {row['questions']} questions, {row['shots']} shots, `{row['config']}`: "
        f"accuracy {row['accuracy']:.3f}, in full precision {row['accuracy_fp16']:.3f} (standard error of the "
        f"difference {row['difference_stderr']:.3f}); normalized by length {row['accuracy_norm']:.3f} and "
        f"{row['accuracy_norm_fp16']:.3f}; the same answer to {row['agreement']:.1%}; {row['compression']:.2f}x"
    )


def _needle(result: Json) -> str:
    rows = result["rows"]
    found, full = (sum(row[name] * row["trials"] for row in rows) for name in ("found", "found_fp16"))
    return (
        f"A code at {len(rows)} depths of {result['context']:,} tokens, `{rows[0]['config']}`: found {found:.0f} of "
        f"{sum(row['trials'] for row in rows)} times, in full precision {full:.0f}; {rows[0]['compression']:.2f}x"
    )


def turns(result: Json) -> str:
    """`qaq eval --turns`: the loss of each configuration by turn."""
    own: dict[str, list[Json]] = {}
    for row in result["rows"]:
        own.setdefault(row["config"], []).append(row)
    first = result["rows"][0]
    told = []
    for config, rows in own.items():
        by_turn = ", ".join(f"{row['kl_mean']:.3f}" for row in rows)
        told.append(
            f"`{config}`: KL by turn {by_turn}; ΔNLL of the first turn {loss(rows[0])}, of the last "
            f"{loss(rows[-1])}; {rows[-1]['compression']:.2f}x at the end"
        )
    sessions = "session" if first["documents"] == 1 else "sessions"
    size = f"{result['turns']} turns of {result['context']} + {result['decode']} tokens"
    return f"{size}, {first['documents']} {sessions}, " + ". ".join(told)


def decode(measured: Sequence[Runs]) -> str:
    """`qaq bench decode`."""
    head = [
        "context",
        "sequences",
        "weights",
        "threads",
        "kernels",
        "cache",
        "tokens/s",
        "over DynamicCache",
        "median step",
    ]
    head += ["resident", "runs", "source"]
    ordered = sorted(measured, key=lambda runs: (runs.first["rows"][0]["context"], runs.source))
    return table(head, (cells for runs in ordered for cells in _decode_rows(runs)))


def _decode_rows(runs: Runs) -> Iterator[list[object]]:
    weights = runs.first["weights"] + (", compiled" if runs.first["compiled"] else "")
    for at, row in enumerate(runs.first["rows"]):
        yield [
            f"{row['context']:,}",
            row["batch"],
            weights,
            runs.first["threads"],
            runs.first["isa"] or "torch",
            "DynamicCache, float32" if row["cache"] == "dynamic" else f"`{row['cache']}`",
            runs.figure("rows", at, "tokens_per_second"),
            runs.figure("rows", at, "ratio_to_dynamic_cache", shape="{:.2f}"),
            runs.figure("rows", at, "median_ms", shape="{:.0f}", unit=" ms"),
            f"{row['kv_bytes'] / 1e6:.1f} MB",
            len(runs.results),
            runs.link,
        ]


def prefill(measured: Sequence[Runs]) -> str:
    """`qaq bench prefill`."""
    if not measured:
        return "No run is recorded."
    head = [
        "tokens",
        "weights",
        "threads",
        "kernels",
        "cache",
        "first token",
        "packed",
        "DynamicCache over first token",
    ]
    return table(
        [*head, "over packed", "CPU time over it", "runs", "source"],
        (cells for runs in measured for cells in _prefill_rows(runs)),
    )


def _prefill_rows(runs: Runs) -> Iterator[list[object]]:
    for at, row in enumerate(runs.first["rows"]):
        told = "first_token_milliseconds" in row  # earlier runs have none
        yield [
            f"{row['context']:,}",
            runs.first["weights"],
            runs.first["threads"],
            runs.first["isa"] or "torch",
            "DynamicCache, float32" if row["cache"] == "dynamic" else f"`{row['cache']}`",
            runs.figure("rows", at, "first_token_milliseconds", scale=1e-3, shape="{:.2f}", unit=" s") if told else "-",
            runs.figure("rows", at, "milliseconds", scale=1e-3, shape="{:.2f}", unit=" s"),
            runs.figure("rows", at, "first_token_ratio_to_dynamic_cache", shape="{:.2f}") if told else "-",
            runs.figure("rows", at, "ratio_to_dynamic_cache", shape="{:.2f}"),
            runs.figure("rows", at, "cpu_ratio_to_dynamic_cache", shape="{:.2f}"),
            len(runs.results),
            runs.link,
        ]


def attention(measured: Sequence[Runs]) -> str:
    """`qaq bench attention`: the C++ kernel, and how many times as long dense attention takes."""
    return bullets(
        _attention(runs, at)
        for runs in measured
        for at, row in enumerate(runs.first["rows"])
        if row["backend"] == "qaq/cpu"
    )


def _attention(runs: Runs, at: int) -> str:
    row = runs.first["rows"][at]

    def median(name: str) -> float:
        return statistics.median(runs.values("rows", at, "ratio_to", name))

    def over(name: str) -> str:
        return runs.figure("rows", at, "ratio_to", name, unit="x")

    half = min((name for name in row["ratio_to"] if name.endswith("-bf16")), key=median)
    return (
        f"{row['shape']}, {row['tokens']:,} tokens: "
        f"{runs.figure('rows', at, 'microseconds', scale=1e-3, shape='{:.2f}', unit=' ms')}, largest error "
        f"{row['error']:.0e}. SDPA in float32 {over('sdpa-fp32')}, with grouped heads {over('grouped-sdpa-fp32')}; the "
        f"fastest in bfloat16 {over(half)}; dequantization, then SDPA {over('dequantize-sdpa')} ({runs.link}, "
        f"{len(runs.results)} {'run' if len(runs.results) == 1 else 'runs'})"
    )


def serving(measured: Sequence[Runs]) -> str:
    """`qaq bench serve`, `prefix` and `elastic`, and `qaq demo`."""
    rows = (
        [*cells, len(runs.results), runs.link]
        for sign, kind in _SERVING.items()
        for runs in measured
        if runs.first.get(sign) is not None
        for cells in kind(runs)
    )
    return table(["what", "figure", "value", "runs", "source"], rows)


def _streams(runs: Runs) -> Iterator[tuple[str, str, str]]:
    _, _, option = runs.facts[0]["command"].partition("--weights ")
    what = f"{runs.first['streams']['streams']} streams, weights {option.partition(' ')[0] or 'auto'}"
    yield what, "one stream", runs.figure("streams", "tokens_per_second_alone", unit=" tokens/s")
    yield what, "all streams together", runs.figure("streams", "tokens_per_second", unit=" tokens/s")
    yield what, "all over one", runs.figure("streams", "ratio", shape="{:.2f}", unit="x")
    yield what, "slowest over median", runs.figure("streams", "slowest_to_median", shape="{:.2f}", unit="x")
    yield what, "added by the router per token", runs.figure("router", "way_ms", shape="{:.2f}", unit=" ms")


def _memory(runs: Runs) -> Iterator[tuple[str, str, str]]:
    memory = runs.first["memory"]
    for at, process in enumerate(memory["processes"]):
        for moment, sessions in (("warm", memory["warm_sessions"]), ("end", memory["sessions"])):
            size = runs.figure("memory", "processes", at, moment, scale=1e-6, shape="{:,.0f}", unit=" MB")
            name = process["process"].split()[0].replace("originals", "cache service")
            yield f"{memory['sessions']} sessions, 4 at a time", f"RSS of the {name}, after {sessions}", size


def _prefix(runs: Runs) -> Iterator[tuple[str, str, str]]:
    what = f"prefix of {runs.first['context']:,} tokens"
    loaded = f"TTFT, {runs.first['loaded_tokens']:,} tokens loaded"
    yield what, "TTFT, computed", runs.figure("computed_ttft_ms", scale=1e-3, unit=" s")
    yield what, loaded, runs.figure("loaded_ttft_ms", scale=1e-3, unit=" s")
    yield what, "computed over loaded", runs.figure("ratio", unit="x")


def _elastic(runs: Runs) -> Iterator[tuple[str, str, str]]:
    what = f"{runs.first['sessions']} sessions of {runs.first['context']:,} tokens under a budget"
    yield what, "budget", runs.figure("budget_bytes", scale=1e-6, shape="{:.0f}", unit=" MB")
    yield what, "resident", runs.figure("kv_bytes", scale=1e-6, shape="{:.0f}", unit=" MB")
    yield what, "the same at 16 bits", runs.figure("kv_bytes_fp16", scale=1e-6, shape="{:,.0f}", unit=" MB")
    yield what, "bits per element, all counted", runs.figure("bits", shape="{:.2f}")
    yield what, "all sessions together", runs.figure("tokens_per_second", unit=" tokens/s")
    yield what, "half the budget is reached after", runs.figure("shrink_seconds", shape="{:.2f}", unit=" s")
    yield what, "longest gap between tokens meanwhile", runs.figure("longest_gap_seconds", shape="{:.2f}", unit=" s")
    yield what, "streams stopped", runs.figure("streams_stopped", shape="{:.0f}")
    yield what, "budget lifted: 95% of the bits back after", runs.figure("recover_seconds", unit=" s")


def _demo(runs: Runs) -> Iterator[tuple[str, str, str]]:
    yield "`qaq demo`", "TTFT", runs.figure("ttft_ms", scale=1e-3, unit=" s")
    yield "`qaq demo`", "decode", runs.figure("tokens_per_second", unit=" tokens/s")
    yield "`qaq demo`", "resident", runs.figure("kv_bytes", scale=1e-6, unit=" MB")
    yield "`qaq demo`", "compression", runs.figure("compression", shape="{:.2f}", unit="x")
    yield "`qaq demo`", "rows quantized again", runs.figure("rows_requantized", shape="{:,.0f}")


def faults(measured: Sequence[Runs]) -> str:
    """`make faults`: what was broken, and what the clients lost."""
    if not measured:
        return "No run is recorded."
    head = ["what", "times", "streams lost", "tokens lost", "tokens repeated", "median gap", "worst gap", "source"]
    rows = table(head, (cells for runs in measured for cells in _fault_rows(runs)))
    return "\n\n".join([rows, bullets(_heard(runs) for runs in measured)])


def _fault_rows(runs: Runs) -> Iterator[list[object]]:
    for row in runs.first["faults"]:
        yield [
            f"{row['role']} {row['how']}",
            row["times"],
            row["streams_lost"],
            row["tokens_lost"],
            row["tokens_repeated"],
            f"{row['gap_median_seconds']:.1f} s",
            f"{row['gap_worst_seconds']:.1f} s",
            runs.link,
        ]


def _heard(runs: Runs) -> str:
    result, found = runs.first, runs.first["verdict"]
    changed = (
        ""
        if found["changed"] is None
        else (f"; {found['changed']} of {found['compared']} differ from an undisturbed one in their first tokens")
    )
    return (
        f"{result['clients']} clients with preset `{result['preset']}`, {result['workers']} workers, "
        f"{result['routers']} routers, {result['seconds'] / 60:.0f} minutes: {found['tokens']:,} tokens of "
        f"{found['streams']:,} streams, of which {found['finished']:,} came to their end{changed} ({runs.link})"
    )


_SERVING: dict[str, Callable[[Runs], Iterator[tuple[str, str, str]]]] = {
    "streams": _streams,
    "loaded_ttft_ms": _prefix,
    "bits_squeezed": _elastic,
    "memory": _memory,
    "redis_server": _demo,
}
"""By a field that only this benchmark fills."""
