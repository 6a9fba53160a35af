"""Measurements: results of one document and configuration, and their summary over documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from qaq_core import Method, SequenceCache
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_eval.quality.documents import Document
from qaq_eval.quality.journal import Journal, name_of
from qaq_eval.quality.tails import standard_error, tails

MAP_BINS = 32


@dataclass(frozen=True)
class DocumentResult:
    """One document under one configuration. Bytes are sums over the decode steps.

    Attributes:
        nll_full, nll, kl: per decoded token, in nats; nll_full is of full precision.
        agreed: decoded tokens after which the most likely token is that of full precision.
        resident_bytes, fp16_bytes: bytes of the cache, and of the same tokens in fp16.
        packed_bytes, packed_fp16_bytes: the same without the residual window.
        bits_key, bits_value: mean code bits per element at the end.
        turn: the turn of a session, from 1; 0 without turns.
        exceptions_at: exceptions of each decode step.
        map_key, map_value: mean bits at the end by layer and position, in `MAP_BINS` equal parts of the sequence;
            tokens of the residual window count 16.
    """

    document: int
    config: str
    nll_full: list[float]
    nll: list[float]
    kl: list[float]
    agreed: int
    resident_bytes: int
    fp16_bytes: int
    packed_bytes: int
    packed_fp16_bytes: int
    bits_key: float
    bits_value: float
    exceptions: int
    requantize_bytes: int
    turn: int = 0
    exceptions_at: list[int] = field(default_factory=list)
    map_key: list[list[float]] = field(default_factory=list)
    map_value: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class EvalResult:
    """One configuration over all documents. NLL and KL are in nats per decoded token.

    Attributes:
        nll: of full precision.
        compression: fp16 bytes over resident bytes.
        compression_asymptotic: the same without the residual window; None if nothing is packed.
        delta_nll_se: standard error, see `standard_error`. kl_mean, …, kl_max_se: see `tails`.
    """

    config: str
    context: int
    documents: int
    tokens: int
    nll: float
    compression: float
    compression_asymptotic: float | None
    bits_key: float
    bits_value: float
    delta_nll: float
    delta_nll_se: float
    kl_mean: float
    kl_mean_se: float
    kl_median: float
    kl_median_se: float
    kl_p99: float
    kl_p99_se: float
    kl_max: float
    kl_max_se: float
    top1_agreement: float
    exceptions_per_token: float
    requantize_bytes_per_token: float


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache, see `DocumentResult`."""

    resident: int
    fp16: int
    packed: int
    packed_fp16: int

    @classmethod
    def of(cls, sequence: SequenceCache) -> CacheBytes:
        method, packed_tokens = sequence.method, len(sequence.packed)
        heads = method.shape.layers * method.shape.kv_heads
        statistic = packed_tokens * heads * method.statistic.bytes_per_token
        packed = sequence.packed.nbytes + statistic if packed_tokens else 0
        token = fp16_token_bytes(method)
        return cls(sequence.nbytes, sequence.length * token, packed, packed_tokens * token)

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(
            self.resident + other.resident,
            self.fp16 + other.fp16,
            self.packed + other.packed,
            self.packed_fp16 + other.packed_fp16,
        )


class Measurement:
    """Collects the result of a sequence while it decodes."""

    def __init__(self, document: int, config: str, sequence: SequenceCache, turn: int = 0) -> None:
        self._document, self._config, self.sequence, self._turn = document, config, sequence, turn
        self._before = sequence.stats()
        self._exceptions = [self._before.exceptions]
        self._nll_full: list[float] = []
        self._nll: list[float] = []
        self._kl: list[float] = []
        self._agreed = 0
        self._bytes = CacheBytes(0, 0, 0, 0)

    def add(self, full: torch.Tensor, quantized: torch.Tensor, token: int) -> None:
        """Adds a step.

        Args:
            full, quantized: log probabilities [vocabulary] of full precision and of the sequence.
            token: the token that follows in the document.
        """
        self._nll_full.append(-float(full[token]))
        self._nll.append(-float(quantized[token]))
        # Rounding may give a tiny negative sum.
        self._kl.append(max(0.0, float((full.exp() * (full - quantized)).double().sum())))
        self._agreed += int(full.argmax() == quantized.argmax())
        self._exceptions.append(self.sequence.requantizer.counts.exceptions)
        self._bytes += CacheBytes.of(self.sequence)

    def result(self) -> DocumentResult:
        stats = self.sequence.stats()
        return DocumentResult(
            document=self._document,
            config=self._config,
            nll_full=self._nll_full,
            nll=self._nll,
            kl=self._kl,
            agreed=self._agreed,
            resident_bytes=self._bytes.resident,
            fp16_bytes=self._bytes.fp16,
            packed_bytes=self._bytes.packed,
            packed_fp16_bytes=self._bytes.packed_fp16,
            bits_key=mean_bits(stats.key_bits),
            bits_value=mean_bits(stats.value_bits),
            exceptions=stats.exceptions - self._before.exceptions,
            requantize_bytes=stats.requantize_bytes - self._before.requantize_bytes,
            turn=self._turn,
            exceptions_at=[after - before for before, after in pairwise(self._exceptions)],
            map_key=bits_map(self.sequence, KEY),
            map_value=bits_map(self.sequence, VALUE),
        )


def bits_map(sequence: SequenceCache, side: int) -> list[list[float]]:
    """Mean bits by layer and part of the sequence, see `DocumentResult`."""
    bits = sequence.bits(side).mean(1)
    pooled = torch.nn.functional.adaptive_avg_pool1d(bits, min(MAP_BINS, bits.shape[1]))
    return [[round(x, 2) for x in layer] for layer in pooled.tolist()]


def fp16_token_bytes(method: Method) -> int:
    """Bytes of one token's keys and values in fp16."""
    return method.shape.layers * 2 * method.shape.kv_heads * method.shape.head_dim * 2


def mean_bits(histogram: dict[float, int]) -> float:
    """Mean code bits per element; 16 if nothing is packed."""
    total = sum(histogram.values())
    return sum(width * count for width, count in histogram.items()) / total if total else 16.0


def summarize(results: Sequence[DocumentResult], config: str, context: int) -> EvalResult:
    """The summary of a configuration over its documents."""
    own = [result for result in results if result.config == config]
    if not own:
        raise ConfigError(f"there is no measurement of {config}")
    full = torch.tensor([x for result in own for x in result.nll_full], dtype=torch.float64)
    deltas = torch.tensor([x for result in own for x in result.nll], dtype=torch.float64) - full
    tokens = len(deltas)
    packed = sum(result.packed_bytes for result in own)
    return EvalResult(
        config=config,
        context=context,
        documents=len(own),
        tokens=tokens,
        nll=float(full.mean()),
        compression=sum(result.fp16_bytes for result in own) / sum(result.resident_bytes for result in own),
        compression_asymptotic=sum(result.packed_fp16_bytes for result in own) / packed if packed else None,
        bits_key=sum(result.bits_key for result in own) / len(own),
        bits_value=sum(result.bits_value for result in own) / len(own),
        delta_nll=float(deltas.mean()),
        delta_nll_se=standard_error(deltas.split([len(result.kl) for result in own])),
        **tails([torch.tensor(result.kl, dtype=torch.float64) for result in own]),
        top1_agreement=sum(result.agreed for result in own) / tokens,
        exceptions_per_token=sum(result.exceptions for result in own) / tokens,
        requantize_bytes_per_token=sum(result.requantize_bytes for result in own) / tokens,
    )


def run_name(about: dict[str, object], documents: Sequence[Document]) -> str:
    """The name of a run: the model, the settings without the number of documents, and the first document's tokens."""
    return name_of(about, documents[0].ids.numpy().tobytes())


class ResultLog:
    """Results of one run, kept in a `Journal`.

    Args:
        run: the run's name, see `run_name`.
        path: file of the journal, or None to keep results in memory only.
    """

    def __init__(self, run: str, path: Path | None) -> None:
        self._journal = Journal(run, path)
        self.results = {(r.document, r.config, r.turn): r for r in self._journal.entries(DocumentResult)}

    def has(self, document: int, config: str, turn: int = 0) -> bool:
        return (document, config, turn) in self.results

    def add(self, result: DocumentResult) -> None:
        self.results[result.document, result.config, result.turn] = result
        self._journal.add(asdict(result))

    def select(self, documents: Iterable[int], configs: Iterable[str], turn: int = 0) -> list[DocumentResult]:
        """Results of these documents and configurations, for one turn."""
        wanted = set(configs)
        return [self.results[i, config, turn] for i in documents for config in wanted if self.has(i, config, turn)]
