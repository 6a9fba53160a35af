"""An answer through a worker, a cache service and Redis, of a stack that is started for it and stopped after it."""

from __future__ import annotations

from pathlib import Path

from qaq_eval.speed.gpu_check.bench import Machine, Report, Table

PROMPT, LONG = "Name the capitals of France, Italy and Spain, and say a sentence about each of them. ", 12
ANSWER = 96
BITS = 2.2


def serve(machine: Machine, report: Report, model: Path | None = None) -> Table:
    """With exceptions: the answer's rows are quantized again from the originals that the cache service holds."""
    from qaq_core.base.errors import ModelLoadError
    from qaq_core.models import default_model_path
    from services.cli.demo import measure
    from services.cluster import control
    from services.cluster.state import StackSettings

    table = Table("A served answer", ["what", "found"])
    try:
        path = model or default_model_path()
    except ModelLoadError as error:
        table.notes.append(f"not run: {error}")
        return table
    device = "cpu" if machine.emulated else str(machine.device)
    settings = StackSettings.model_validate(
        {"model": str(path), "port": 0, "device": device, "weights": "plain", "target_bits": BITS}
    )
    repeated, tokens = (2, 24) if machine.emulated else (LONG, ANSWER)
    with control.attached(settings, lambda name, what, share: report(f"served: {name}, {what}", share)) as running:
        report("served: asking", None)
        result = measure(running, PROMPT * repeated, tokens).result
    numbers = {
        "model": path.name,
        "prompt, answer, tokens": f"{result.prompt_tokens}, {result.tokens}",
        "first token, ms": "emulated" if machine.emulated else f"{result.ttft_ms:.0f}",
        "tokens/s": "emulated" if machine.emulated else f"{result.tokens_per_second:.1f}",
        "keys and values, KiB; of float16": f"{result.kv_bytes >> 10}; {result.kv_bytes_fp16 >> 10}",
        "exceptions; rows quantized again": f"{result.exceptions}; {result.rows_requantized}",
        "originals in Redis, KiB": str(result.originals_bytes_in_redis >> 10),
        "text": result.text.strip().replace("\n", " ")[:80],
    }
    table.rows = [[name, found] for name, found in numbers.items()]
    if not result.exceptions or not result.rows_requantized:
        table.failed.append("the answer had no exceptions")
    if not result.originals_bytes_in_redis:
        table.failed.append("no originals have reached Redis")
    return table
