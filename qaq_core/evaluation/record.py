"""What is measured: parts, one per document and configuration, and rows, which sum parts up."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from blake3 import blake3

from qaq_core.errors import ConfigError
from qaq_core.evaluation.documents import Document
from qaq_core.sequence import SequenceCache


@dataclass(frozen=True)
class Part:
    """One document under one configuration. Bytes are sums over the steps of the decode.

    Attributes:
        nll_exact, nll, kl: per decoded token, in nats.
        resident, plain: bytes held, and bytes of the same tokens in fp16.
        packed_resident, packed_plain: the same without sinks and recent tokens.
        bits_key, bits_value: mean code bits an element at the end.
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

    def __init__(self, document: int, config: str, sequence: SequenceCache) -> None:
        self._document, self._config, self.sequence = document, config, sequence
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
        for i, count in enumerate(self._held()):
            self._bytes[i] += count

    def _held(self) -> tuple[int, int, int, int]:
        sequence, shape = self.sequence, self.sequence.method.shape
        token = shape.layers * 2 * shape.kv_heads * shape.head_dim * 2
        packed = len(sequence.packed)
        window = packed * shape.layers * shape.kv_heads * sequence.method.window.bytes_per_token
        resident = sequence.packed.nbytes + window if packed else 0
        return sequence.nbytes, sequence.length * token, resident, packed * token

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
            exceptions=stats.exceptions,
            requantize_bytes=stats.requantize_bytes,
        )


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
    digest = blake3(json.dumps({**about, "documents": None}, sort_keys=True).encode())
    # Documents of one text and one setting begin with the same first.
    digest.update(documents[0].ids.numpy().tobytes())
    return digest.hexdigest(16)


class PartLog:
    """Parts in a file of JSON lines, so that a run that was stopped goes on where it was.

    Args:
        run: what the parts are of (model, text, lengths); parts of another run are left alone.
        path: of the file, or None to keep parts in memory only.
    """

    def __init__(self, run: str, path: Path | None) -> None:
        self._run, self._path = run, path
        self.parts: dict[tuple[int, str], Part] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        names = {field.name for field in fields(Part)}
        try:
            told = json.loads(line)
        except ValueError:
            return  # the last line of a run that was killed while it wrote
        if isinstance(told, dict) and told.pop("run", None) == self._run and set(told) == names:
            part = Part(**told)
            self.parts[part.document, part.config] = part

    def has(self, document: int, config: str) -> bool:
        return (document, config) in self.parts

    def add(self, part: Part) -> None:
        self.parts[part.document, part.config] = part
        if self._path is not None:
            whole = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
            with self._path.open("a") as file:
                file.write(("" if whole else "\n") + json.dumps({"run": self._run, **asdict(part)}) + "\n")

    def select(self, documents: Iterable[int], configs: Iterable[str]) -> list[Part]:
        """Parts of these documents and configurations."""
        wanted = set(configs)
        return [self.parts[i, config] for i in documents for config in wanted if self.has(i, config)]
