"""Tables from anywhere: they are refused by a ConfigError or another Python error, or they serve; nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from qaq_core.base import rope
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY
from qaq_core.base.rows import RowRequest
from qaq_core.kernels import NativeEncoder, load_library, make_encoder
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import LinearTransform
from tests.core.rows import page_shape, quantizers, request, rotated

LAYERS, HEADS, DIM, ROWS = 2, 2, 32, 40
NOTE = "codec_settings"
BASE = quantizers(LAYERS, HEADS, DIM)["balanced"]
MADE = {"linear": BASE, "own": BASE.centered_on(torch.ones(LAYERS, 2, HEADS, 64, DIM), 4), "rotated": rotated(BASE)}
# More of them: QAQ_FUZZ=100000 pytest tests/core/quantization/test_tables.py
TRIES = int(os.environ.get("QAQ_FUZZ", "400"))

Tables = dict[str, torch.Tensor]


def rows_of(quantizer: Quantizer, random: np.random.Generator) -> RowRequest:
    """Rows of every layer, head and side, at positions far apart."""
    meta = torch.from_numpy(random.integers(0, 256, (1, 1, 4096, quantizer.meta_bytes), np.uint8))
    have = random.choice([0, 2, 6], ROWS)
    return request(
        page_shape(LAYERS, HEADS, DIM),
        meta,
        layer=random.integers(0, LAYERS, ROWS),
        head=random.integers(0, HEADS, ROWS),
        position=random.integers(0, 4096, ROWS),
        side=random.integers(0, 2, ROWS),
        have=have,
        want=random.choice([8, 16, 32], ROWS),
    )


def serve(raw: bytes, base: Quantizer | None, random: np.random.Generator) -> bool:
    """Uses tables as a cache service does. False if they were refused."""
    try:
        quantizer = Quantizer.from_bytes(raw, base, make_encoder())
        rows = rows_of(quantizer, random)
        planes = quantizer.requantize(rows, torch.randn(ROWS, DIM))
    except (ConfigError, IndexError, KeyError, RuntimeError, SafetensorError, TypeError, ValueError):
        return False
    assert len(planes) == rows.payload_bytes().sum()
    return True


def reshaped(tables: Tables, random: np.random.Generator) -> None:
    name = random.choice(sorted(set(tables) - {NOTE}))
    tensor = tables[name]
    dim, kind = int(random.integers(tensor.dim())), random.integers(4) if tensor.numel() else 3
    if kind == 0:
        tables[name] = tensor.narrow(dim, 0, int(random.integers(tensor.shape[dim]))).contiguous()
    elif kind == 1:
        tables[name] = torch.cat([tensor, tensor], dim)
    elif kind == 2:
        tables[name] = tensor.reshape(-1)
    else:
        del tables[name]


def retyped(tables: Tables, random: np.random.Generator) -> None:
    name = random.choice(sorted(set(tables) - {NOTE}))
    kinds = [torch.float64, torch.float32, torch.float16, torch.int64, torch.int8, torch.bool]
    tables[name] = tables[name].to(kinds[random.integers(len(kinds))])


def other_numbers(tables: Tables, random: np.random.Generator) -> None:
    name = random.choice(sorted(set(tables) - {NOTE}))
    tensor = tables[name].clone()
    wild = [float("nan"), float("inf"), -1.0, 0.0, 1e30, 127.0]
    numbers = tensor.view(-1)
    if len(numbers):
        value = wild[random.integers(len(wild))] if tensor.is_floating_point() else int(random.integers(-9, 9))
        numbers[int(random.integers(len(numbers)))] = value
    tables[name] = tensor


def other_settings(tables: Tables, random: np.random.Generator) -> None:
    note: dict[str, Any] = json.loads(bytes(tables[NOTE].numpy()))
    codec = note.get("codec")
    orders = codec.get("orders") if isinstance(codec, dict) else None
    orders = orders if orders and all(orders) else None
    kind = random.integers(5)
    if orders and kind < 2:
        order = orders[random.integers(len(orders))]
        order[random.integers(len(order))] = int(random.integers(-1, 300))
    elif orders and kind == 2:
        note["codec"]["orders"] = [order[: 16 * int(random.integers(3))] for order in orders]
    elif kind == 3:
        note["transform"] = ["identity", "linear", "", None][random.integers(4)]
    else:
        note["codec"] = [{"name": "uniform", "granularity": "head"}, {"name": "gaussian"}, {}, 7][random.integers(4)]
    tables[NOTE] = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)


CHANGES: tuple[Callable[[Tables, np.random.Generator], None], ...] = (
    reshaped,
    retyped,
    other_numbers,
    other_settings,
)


@pytest.mark.parametrize("kind", MADE)
def test_any_tables_are_refused_or_serve(kind: str) -> None:
    random = np.random.default_rng(7)
    original, base = MADE[kind].to_bytes(), MADE[kind].base
    assert serve(original, base, random)
    served = 0
    for _ in range(TRIES):
        tables = load(original)
        for change in random.choice(np.array(CHANGES), int(random.integers(1, 4))):
            if len(tables) > 1:
                change(tables, random)
        raw = bytearray(save(tables))
        if random.integers(4) == 0:
            raw[int(random.integers(len(raw)))] ^= 1 << int(random.integers(8))
        served += serve(bytes(raw), base, random)
    assert 0 < served < TRIES, "some changes do no harm, most do"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("key_matrix", lambda tensor: tensor[:0], "key_matrix"),
        ("value_matrix", lambda tensor: tensor[:, :, :16], "value_matrix"),
        ("value_mean", lambda tensor: tensor[..., :16], "value_mean"),
        ("key_mean", lambda tensor: tensor.fill_(torch.nan), "key_mean holds NaN"),
        ("kind", lambda tensor: tensor + 9, "kind must name one of"),
        ("kind", lambda tensor: tensor - 1, "kind must name one of"),
        ("kind", lambda tensor: tensor[:1], r"kind is \[1\]"),
        ("kind", lambda tensor: tensor * torch.nan, "kind must name one of"),
        ("frequencies", lambda tensor: tensor[:, :3], "frequencies"),
        ("frequencies", lambda tensor: tensor[:1].repeat(20_000, 1), "1 to 4 kinds"),
    ],
)
def test_what_is_wrong_is_named(name: str, change: Callable[[torch.Tensor], torch.Tensor], said: str) -> None:
    tables = load(BASE.to_bytes())
    tables[name] = change(tables[name].clone()).contiguous()
    with pytest.raises(ConfigError, match=said):
        Quantizer.from_bytes(save(tables))


@pytest.mark.parametrize(
    "orders",
    [
        [[0] * DIM, [0] * DIM],
        [[0] * 9 + [1] * 7 + [2] * 8 + [3] * 8] * 2,
        [[*range(4)] * 8],
        [[], []],
        [[200] * DIM] * 2,
    ],
)
def test_an_order_names_every_octet_eight_times(orders: list[list[int]]) -> None:
    tables = load(BASE.to_bytes())
    note = json.loads(bytes(tables[NOTE].numpy()))
    note["codec"]["orders"] = orders
    tables[NOTE] = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
    with pytest.raises(ConfigError, match="orders"):
        Quantizer.from_bytes(save(tables))


def test_a_codec_for_rows_of_another_size_is_refused_when_it_is_used() -> None:
    tables, smaller = load(BASE.to_bytes()), quantizers(LAYERS, HEADS, 16 * 3)["balanced"]
    tables[NOTE] = load(smaller.to_bytes())[NOTE]
    quantizer = Quantizer.from_bytes(save(tables))
    with pytest.raises(ConfigError, match="head_dim of 48, not 32"):
        quantizer.layout(KEY, DIM)


@pytest.mark.skipif(load_library() is None, reason="the C++ library is not built")
def test_tables_are_encoded_in_cpp() -> None:
    quantizer = Quantizer.from_bytes(BASE.to_bytes(), make_encoder=make_encoder())
    assert isinstance(quantizer.encoder(torch.device("cpu")), NativeEncoder)


def test_rows_far_away_are_the_same_with_and_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch and in C++; a table up to the largest position could have gigabytes."""
    random, originals = np.random.default_rng(3), torch.randn(ROWS, DIM)
    rows, raw = rows_of(BASE, random), BASE.to_bytes()
    quantizers = [Quantizer.from_bytes(raw), Quantizer.from_bytes(raw, make_encoder=make_encoder())]
    with_table = [quantizer.requantize(rows, originals) for quantizer in quantizers]
    monkeypatch.setattr(rope, "TABLE_BYTES", 0)
    quantizers = [Quantizer.from_bytes(raw), Quantizer.from_bytes(raw, make_encoder=make_encoder())]
    without = [quantizer.requantize(rows, originals) for quantizer in quantizers]
    for planes in (*with_table, *without):
        assert np.array_equal(planes, with_table[0])
    transform = quantizers[0].transform
    assert isinstance(transform, LinearTransform)
    assert not transform._angles._table.numel()
