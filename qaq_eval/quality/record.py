"""What is measured: parts, one per document and configuration, and rows, which sum parts up."""

from __future__ import annotations

import math
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

MAP_BINS = 32


@dataclass(frozen=True)
class Part:
    """One document under one configuration. Bytes are sums over the steps of the decode.

    Attributes:
        nll_exact, nll, kl: per decoded token, in nats.
        resident, plain: bytes held, and bytes of the same tokens in fp16.
        packed_resident, packed_plain: the same without sinks and recent tokens.
        bits_key, bits_value: mean code bits an element at the end.
        turn: of a session, from 1 on; 0 if there are no turns.
        exceptions_at: exceptions of each step.
        map_key, map_value: mean bits at the end by layer and by position, in `MAP_BINS` equal parts of the
            sequence; exact tokens count 16.
    """

    document: int
    config: str
    nll_exact: list[float]
    nll: list[float]
    kl: list[float]
    agreed: int
    resident: int
    plain: int
    packed_resident: int
    packed_plain: int
    bits_key: float
    bits_value: float
    exceptions: int
    requantize_bytes: int
    turn: int = 0
    exceptions_at: list[int] = field(default_factory=list)
    map_key: list[list[float]] = field(default_factory=list)
    map_value: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One configuration over all documents, NLL and KL in nats per decoded token.

    Attributes:
        nll: of full precision, per token.
        delta_nll_se: over documents, whose tokens are not independent; over tokens if there is only one.
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
    kl_p99: float
    top1_agreement: float
    exceptions_per_token: float
    requantize_bytes_per_token: float


class Measure:
    """Gathers a part while its sequence decodes."""

    def __init__(self, document: int, config: str, sequence: SequenceCache, turn: int = 0) -> None:
        self._document, self._config, self.sequence, self._turn = document, config, sequence, turn
        self._before = sequence.stats()
        self._exceptions = [self._before.exceptions]
        self._nll: tuple[list[float], list[float]] = ([], [])
        self._kl: list[float] = []
        self._agreed = 0
        self._bytes = [0, 0, 0, 0]

    def add(self, exact: torch.Tensor, got: torch.Tensor, token: int) -> None:
        """Takes in a step: log probabilities [vocabulary] of full precision and of the sequence, and the truth."""
        self._nll[0].append(-float(exact[token]))
        self._nll[1].append(-float(got[token]))
        # Rounding may leave a tiny negative sum.
        self._kl.append(max(0.0, float((exact.exp() * (exact - got)).double().sum())))
        self._agreed += int(exact.argmax() == got.argmax())
        self._exceptions.append(self.sequence.requantizer.counts.exceptions)
        for i, count in enumerate(held_bytes(self.sequence)):
            self._bytes[i] += count

    def part(self) -> Part:
        stats = self.sequence.stats()
        resident, plain, packed_resident, packed_plain = self._bytes
        return Part(
            document=self._document,
            config=self._config,
            nll_exact=self._nll[0],
            nll=self._nll[1],
            kl=self._kl,
            agreed=self._agreed,
            resident=resident,
            plain=plain,
            packed_resident=packed_resident,
            packed_plain=packed_plain,
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
    """Mean bits by layer and part of the sequence, see `Part`."""
    bits = sequence.bits(side).mean(1)
    pooled = torch.nn.functional.adaptive_avg_pool1d(bits, min(MAP_BINS, bits.shape[1]))
    return [[round(x, 2) for x in row] for row in pooled.tolist()]


def held_bytes(sequence: SequenceCache) -> tuple[int, int, int, int]:
    """Bytes held and the same tokens' in fp16; then both without sinks and recent tokens."""
    method, packed = sequence.method, len(sequence.packed)
    statistic = packed * method.shape.layers * method.shape.kv_heads * method.statistic.bytes_per_token
    resident = sequence.packed.nbytes + statistic if packed else 0
    token = token_bytes(method)
    return sequence.nbytes, sequence.length * token, resident, packed * token


def token_bytes(method: Method) -> int:
    """A token's keys and values in fp16."""
    return method.shape.layers * 2 * method.shape.kv_heads * method.shape.head_dim * 2


def mean_bits(histogram: dict[float, int]) -> float:
    """Code bits an element; what is not packed is in half precision."""
    total = sum(histogram.values())
    return sum(width * count for width, count in histogram.items()) / total if total else 16.0


def summarize(parts: Sequence[Part], config: str, context: int) -> Row:
    """The row of a configuration from its parts."""
    mine = [part for part in parts if part.config == config]
    if not mine:
        raise ConfigError(f"nothing was measured of {config}")
    exact = torch.tensor([x for part in mine for x in part.nll_exact], dtype=torch.float64)
    deltas = torch.tensor([x for part in mine for x in part.nll], dtype=torch.float64) - exact
    kl = torch.tensor([x for part in mine for x in part.kl], dtype=torch.float64)
    tokens = len(kl)
    split = deltas.split([len(part.kl) for part in mine])
    samples = torch.stack([each.mean() for each in split]) if len(mine) > 1 else deltas
    error = float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else 0.0
    packed = sum(part.packed_resident for part in mine)
    return Row(
        config=config,
        context=context,
        documents=len(mine),
        tokens=tokens,
        nll=float(exact.mean()),
        compression=sum(part.plain for part in mine) / sum(part.resident for part in mine),
        compression_asymptotic=sum(part.packed_plain for part in mine) / packed if packed else None,
        bits_key=sum(part.bits_key for part in mine) / len(mine),
        bits_value=sum(part.bits_value for part in mine) / len(mine),
        delta_nll=float(deltas.mean()),
        delta_nll_se=error,
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1_agreement=sum(part.agreed for part in mine) / tokens,
        exceptions_per_token=sum(part.exceptions for part in mine) / tokens,
        requantize_bytes_per_token=sum(part.requantize_bytes for part in mine) / tokens,
    )


def run_name(about: dict[str, object], documents: Sequence[Document]) -> str:
    """Names what parts are of: the model, the settings (but not how many documents), and the tokens."""
    # Documents of one text and one setting begin with the same first.
    return name_of(about, documents[0].ids.numpy().tobytes())


class PartLog:
    """Parts of one run, kept in a `Journal`.

    Args:
        run: what the parts are of (model, text, lengths), see `run_name`.
        path: of the journal, or None to keep parts in memory only.
    """

    def __init__(self, run: str, path: Path | None) -> None:
        self._journal = Journal(run, path)
        self.parts = {(part.document, part.config, part.turn): part for part in self._journal.entries(Part)}

    def has(self, document: int, config: str, turn: int = 0) -> bool:
        return (document, config, turn) in self.parts

    def add(self, part: Part) -> None:
        self.parts[part.document, part.config, part.turn] = part
        self._journal.add(asdict(part))

    def select(self, documents: Iterable[int], configs: Iterable[str], turn: int = 0) -> list[Part]:
        """Parts of these documents and configurations, and of that turn."""
        wanted = set(configs)
        return [self.parts[i, config, turn] for i in documents for config in wanted if self.has(i, config, turn)]
