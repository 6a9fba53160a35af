"""Load generators, against the gateway: they run to the end, and count what was generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .conftest import Run
from .stack import Stack

REQUESTS, PROMPT, ANSWER = 6, 64, 16


def test_aiperf(run: Run, stack: Stack, tokenizer_dir: Path, tmp_path: Path) -> None:
    run(
        *("aiperf", "profile", "--model", stack.model, "--url", stack.url, "--endpoint-type", "completions"),
        *("--streaming", "--tokenizer", tokenizer_dir, "--request-count", REQUESTS, "--concurrency", 2),
        *("--isl", PROMPT, "--isl-stddev", 0, "--osl", ANSWER, "--osl-stddev", 0),
        "--use-server-token-count",  # a text that was sampled may be fewer tokens when it is tokenized again
        *("--extra-inputs", "ignore_eos:true", "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"),
        *("--artifact-dir", tmp_path),
        HF_HUB_OFFLINE="",  # with it, aiperf takes a path for the name of a model on the hub
    )
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS
    assert report["output_sequence_length"]["avg"] == ANSWER
    assert report["time_to_first_token"]["avg"] > 0


def test_guidellm(run: Run, stack: Stack, tokenizer_dir: Path, tmp_path: Path) -> None:
    backend = f"kind=openai_http,target={stack.url},model={stack.model},request_format=/v1/completions"
    run(
        *("guidellm", "run", "--backend", backend, "--profile", "kind=concurrent,streams=2"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={ANSWER}"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer_dir}", "--disable-console"),
    )
    (benchmark,) = json.loads((tmp_path / "benchmarks.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == REQUESTS
    assert not requests["errored"]
    assert all(request["output_metrics"]["text_tokens"] == ANSWER for request in requests["successful"])


def test_inference_perf(run: Run, stack: Stack, tokenizer_dir: Path, tmp_path: Path) -> None:
    def always(length: int) -> dict[str, Any]:
        return {"type": "fixed", "min": length, "max": length, "mean": length, "total_count": REQUESTS}

    settings = {
        "api": {"type": "completion", "streaming": True},
        "server": {"type": "vllm", "model_name": stack.model, "base_url": stack.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(tokenizer_dir)},
        "data": {"type": "random", "input_distribution": always(PROMPT), "output_distribution": always(ANSWER)},
        "load": {
            "type": "concurrent",
            "stages": [{"concurrency_level": 2, "num_requests": REQUESTS}],
            "num_workers": 1,
            "worker_max_concurrency": 2,
        },
        "report": {"request_lifecycle": {"summary": True, "per_request": True}},
        "storage": {"local_storage": {"path": str(tmp_path / "reports")}},
    }
    (tmp_path / "settings.yml").write_text(json.dumps(settings))  # JSON is YAML
    run("inference-perf", "--config_file", tmp_path / "settings.yml")
    summary = json.loads((tmp_path / "reports" / "summary_lifecycle_metrics.json").read_text())
    assert (summary["successes"]["count"], summary["failures"]["count"]) == (REQUESTS, 0)
    for side, count in (("prompt", PROMPT), ("output", ANSWER)):
        tokens = summary["successes"][f"{side}_tokens"]
        assert (tokens["total"], tokens["min"], tokens["max"]) == (REQUESTS * count, count, count)
        assert summary["successes"]["client_fallback_requests"][side] == 0  # the gateway's usage says it
    assert summary["successes"]["latency"]["time_to_first_token"]["mean"] > 0
