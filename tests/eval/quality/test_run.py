"""Evaluation of a tiny model: what is close to full precision is told from what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qaq_core.calibration.measurement
from qaq_core import InProcessOriginals
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import WIDTHS
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.storage import HeldValues
from qaq_eval.quality import (
    Config,
    Document,
    DocumentResult,
    ResultLog,
    evaluate,
    run_name,
    summarize,
)
from qaq_eval.quality import run as quality_run
from qaq_eval.quality.prompt import full_precision
from qaq_eval.quality.record import MAP_BINS
from tests.core.tiny_models import calibration, teacher_forced, tiny, token_ids

KIND, CONTEXT, DECODE = "llama-gqa", 200, 40
NAMES = (
    "fp16",
    "balanced",
    "balanced-norequant",
    "balanced@1.3",
    "paper",
    "uniform-8",
    "uniform-2",
    "hadamard-3",
    "k4v2",
    "kivi-8",
    "kivi-2",
    "turboquant-8bit",
    "turboquant-3bit",
    "oscar-2",
)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model's quick calibration is found by its fingerprint."""
    directory = tmp_path_factory.mktemp("cache")
    calibration(KIND).save(directory / "calibration" / "tiny.safetensors")
    with pytest.MonkeyPatch.context() as patch:  # OSCAR's, on as little text
        patch.setenv("QAQ_CACHE_DIR", str(directory))
        patch.setattr(qaq_core.calibration.measurement, "TOKENS", 32)
        Config.parse("oscar-2").method(tiny(KIND), "tiny")
    return directory


@pytest.fixture(autouse=True)
def _found(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_CACHE_DIR", str(cache_dir))


def documents(count: int = 2, context: int = CONTEXT, decode: int = DECODE) -> list[Document]:
    return [Document(i, token_ids(context + decode + 1, seed=i)[0], context) for i in range(count)]


def run(names: Any, texts: list[Document], **settings: Any) -> list[DocumentResult]:
    return list(evaluate(tiny(KIND), "tiny", texts, [Config.parse(name) for name in names], **settings))


@pytest.fixture(scope="module")
def parts(cache_dir: Path) -> list[DocumentResult]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAQ_CACHE_DIR", str(cache_dir))
        return run(NAMES, documents())


def test_the_baseline_is_the_models_own(parts: list[DocumentResult]) -> None:
    for document in documents():
        ids = document.ids[None]
        logits = teacher_forced(tiny(KIND), ids[:, :-1], CONTEXT)[1:]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, CONTEXT + 1 :], reduction="none")
        got = next(part.nll_full for part in parts if part.document == document.index)
        assert got == pytest.approx(expected.tolist(), abs=1e-4)


def test_exact_has_no_loss(parts: list[DocumentResult]) -> None:
    row = summarize(parts, "fp16", CONTEXT)
    assert abs(row.delta_nll) < 1e-3
    assert row.kl_mean < 1e-4
    assert row.top1_agreement > 0.97
    assert (row.bits_key, row.bits_value, row.exceptions_per_token) == (16, 16, 0)
    # Tags and window statistics are counted too.
    assert 0.85 < row.compression < 1
    assert row.compression_asymptotic is not None
    assert row.compression < row.compression_asymptotic < 1


def test_eight_bits_are_nearly_exact(parts: list[DocumentResult]) -> None:
    for name in ("uniform-8", "kivi-8", "turboquant-8bit"):
        assert summarize(parts, name, CONTEXT).kl_mean < 1e-4


@pytest.mark.parametrize(
    ("better", "worse"),
    [("uniform-8", "uniform-2"), ("kivi-8", "kivi-2"), ("balanced", "balanced@1.3"), ("hadamard-3", "uniform-2")],
)
def test_fewer_bits_are_further_away(parts: list[DocumentResult], better: str, worse: str) -> None:
    high, low = summarize(parts, better, CONTEXT), summarize(parts, worse, CONTEXT)
    assert high.kl_mean < 0.1
    assert low.kl_mean > 1.5 * high.kl_mean
    assert low.kl_p99 > high.kl_p99
    assert low.compression > high.compression
    assert low.bits_key + low.bits_value < high.bits_key + high.bits_value
    assert low.top1_agreement <= high.top1_agreement


def test_widths_are_those_of_the_name(parts: list[DocumentResult]) -> None:
    for name, widths in {"uniform-2": (2, 2), "hadamard-3": (3, 3), "k4v2": (4, 2), "kivi-8": (8, 8)}.items():
        row = summarize(parts, name, CONTEXT)
        assert (row.bits_key, row.bits_value) == widths


def test_bytes_of_packed_tokens_by_hand(parts: list[DocumentResult]) -> None:
    # Bits an element at head_dim 32, one tag byte for a key and its value; codes, then group parameters; and where
    # a head's rows of each width begin, 4 bytes each, over all its packed tokens.
    tag = 8 / 64
    index = [2 * len(WIDTHS) * 32 / (64 * packed) for packed in (CONTEXT - 72, CONTEXT + DECODE)]
    for name, bits in {
        "uniform-2": 2 + 32 / 32,
        "k4v2": 3 + 32 / 32,
        "kivi-2": 2 + 32 / 32,
        "turboquant-3bit": 3 + (16 + 32) / 64,
        "oscar-2": 2 + 32 / 32,
    }.items():
        row = summarize(parts, name, CONTEXT)
        most, least = (16 / (bits + tag + more) for more in reversed(index))
        assert row.compression_asymptotic is not None
        assert least <= row.compression_asymptotic <= most


def test_without_exceptions_nothing_comes_back(parts: list[DocumentResult]) -> None:
    still, moving = (summarize(parts, name, CONTEXT) for name in ("balanced-norequant", "balanced"))
    assert still.exceptions_per_token == still.requantize_bytes_per_token == 0
    assert moving.exceptions_per_token > 0
    assert moving.requantize_bytes_per_token > 0


def test_a_prompt_that_was_computed_elsewhere_is_the_same_prompt() -> None:
    model, document = tiny(KIND), documents(1)[0]
    for preset in ("balanced", "paper"):
        method = make_method(model, "tiny", preset)
        own = Config.parse(preset).method(model, "tiny")
        prefill = full_precision(model, method, document, [method.statistic])
        prefilled = SequenceCache(method)
        prefilled.load_prefill(prefill.originals, prefill.observer(own.statistic))
        cache = QAQCache([SequenceCache(method)])
        with torch.no_grad():
            model(document.ids[None, :CONTEXT], past_key_values=cache)
        expected = cache.sequences[0]
        assert prefilled.length == expected.length == CONTEXT
        assert prefilled.nbytes == pytest.approx(expected.nbytes, rel=0.02)
        for side in (KEY, VALUE):
            same = prefilled.packed.widths(side) == expected.packed.widths(side)
            # The prompt came in chunks there and whole here: sums differ by their rounding.
            assert float(same.float().mean()) > 0.99


def test_parts_say_when_and_where(parts: list[DocumentResult]) -> None:
    for part in parts:
        assert len(part.exceptions_at) == DECODE
        assert sum(part.exceptions_at) == part.exceptions
        for side, bits in ((part.map_key, part.bits_key), (part.map_value, part.bits_value)):
            assert [len(row) for row in side] == [MAP_BINS] * 3
            # Sinks stand in the first part, recent tokens in the last ones; none but packed tokens in the middle.
            assert all(row[-1] == 16 for row in side)
            if part.config.startswith(("uniform", "hadamard", "kivi", "k4v2")):
                assert all(x == bits for row in side for x in row[1:20])
    assert any(part.exceptions_at[-1] for part in parts if part.config == "paper")


def test_documents_decode_alone_as_they_do_beside_others(parts: list[DocumentResult]) -> None:
    alone = run(["uniform-2"], documents()[1:])[0]
    beside = next(part for part in parts if part.document == 1 and part.config == "uniform-2")
    assert alone.kl == pytest.approx(beside.kl, abs=1e-4)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    names, texts, path = ["uniform-8", "uniform-2"], documents(2, 64, 6), tmp_path / "parts.jsonl"
    name = run_name({"model": "tiny", "documents": 2}, texts)
    log = ResultLog(name, path)
    for part in run(names[:1], texts[:1]):
        log.add(part)
    first = dict(log.results)
    with path.open("a") as file:
        file.write('{"run": "')  # killed while it wrote
    log, fresh = ResultLog(name, path), []
    assert log.results == first
    for part in run(names, texts, done=log.has):
        fresh.append((part.document, part.config))
        log.add(part)
    assert fresh == [(0, "uniform-2"), (1, "uniform-8"), (1, "uniform-2")]
    again = ResultLog(name, path)
    assert again.results == log.results
    assert run(names, texts, done=again.has) == []
    assert ResultLog(run_name({"model": "other", "documents": 2}, texts), path).results == {}
    assert run_name({"model": "tiny", "documents": 1}, texts[:1]) == name


def test_parts_sum_up() -> None:
    def part(document: int, nll: list[float], kl: list[float], resident: int) -> DocumentResult:
        return DocumentResult(document, "c", [1.0, 1.0], nll, kl, 1, resident, 400, 50, 300, 2.0, 3.0, 4, 10)

    row = summarize([part(0, [1.0, 1.2], [0.0, 0.2], 100), part(1, [1.4, 1.4], [0.2, 0.4], 60)], "c", 9)
    assert row.delta_nll == pytest.approx(0.25)
    assert row.delta_nll_se == pytest.approx(0.15)  # of the documents' 0.1 and 0.4
    assert row.kl_mean == pytest.approx(0.2)
    assert row.kl_mean_se == pytest.approx(0.1)  # of the documents' 0.1 and 0.3
    assert (row.kl_median, row.kl_max) == (0.2, 0.4)
    assert row.compression == pytest.approx(800 / 160)
    assert row.compression_asymptotic == pytest.approx(6)
    assert row.top1_agreement == 0.5
    assert row.exceptions_per_token == 2
    assert row.requantize_bytes_per_token == 5
    json.dumps(row.__dict__, allow_nan=False)
    with pytest.raises(ConfigError, match="there is no measurement of d"):
        summarize([], "d", 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no preset is called 'nothing'; there are balanced, .*kivi-<bits>"),
        ("uniform-3@2", "takes no target"),
        ("uniform-9", "9/9 bits are not among"),
        ("kivi-9", "1 to 8 bits"),
        ("fp16-norequant", "does not take these settings"),
        ("paper@e0.1", "does not predict its error"),
        ("uniform-3@e0.1", "takes no target"),
        ("balanced@e11", "at most 10 nats"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run([text], documents(1, 64, 2))


def test_originals_may_be_held_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each configuration re-quantizes from a store that holds what its setting says, and nothing else changes."""
    made: list[str] = []

    class Seen(InProcessOriginals):
        def __init__(self, values: HeldValues = "exact") -> None:
            made.append(values)
            super().__init__(values)

    monkeypatch.setattr(quality_run, "InProcessOriginals", Seen)
    names = ("paper", "paper[originals=int8]", "paper[originals=float16]", "paper-norequant[originals=int8]")
    exact, eight, half, never = run(names, documents(1))
    assert sorted(made) == ["exact", "float16", "int8"]
    assert Config.parse(names[1]).settings == Config.parse(names[0]).settings
    assert exact.requantize_bytes > 0
    assert exact.kl != eight.kl
    assert exact.kl == pytest.approx(half.kl, abs=1e-3)
    assert never.requantize_bytes == 0
