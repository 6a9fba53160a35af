"""Bytes of stored pages in each form, and processor time of putting and reading them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from qaq_core.base.pages import PAGE_TOKENS, PageShape, dtype_name
from services.originals.page_format import PageFormat
from services.originals.page_forms import PageForm
from services.originals.seals import Seals

FORMS: tuple[PageForm, ...] = ("plain", "lossless", "float16", "int8")
REQUEST_ROWS = 64
"""Scattered rows that are read of a page at a time."""


@dataclass(frozen=True)
class StoredForm:
    """Pages in one form.

    Attributes:
        dtype: of the keys and values.
        page_bytes: mean of the pages. ratio: to the plain form of the same dtype.
        put_ms, page_ms, row_us: median processor time of packing a page, of reading a whole one, and of a row.
        read_bytes: that are read from Redis for a row, mean.
        error: squared error over the values' variance within a head.
    """

    dtype: str
    form: str
    page_bytes: float
    ratio: float
    put_ms: float
    page_ms: float
    row_us: float
    read_bytes: float
    error: float


@torch.inference_mode()
def keys_and_values(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[layers, 2, kv_heads, tokens, head_dim] of a text, int64 [1, tokens], as the model computes them."""
    layers = model(ids, use_cache=True, logits_to_keep=1).past_key_values.layers
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers]).cpu()


def store_speed(
    values: torch.Tensor, dtypes: Sequence[torch.dtype], repeat: int, report: Callable[[str, float], None] | None = None
) -> list[StoredForm]:
    """Each form at each dtype.

    Args:
        values: [layers, 2, kv_heads, tokens, head_dim], of at least one page.
        repeat: pages of each that are timed.
    """
    rows: list[StoredForm] = []
    for number, dtype in enumerate(dtypes):
        pages = [page.to(dtype).contiguous() for page in values.split(PAGE_TOKENS, 3) if page.shape[3] == PAGE_TOKENS]
        plain = 0.0
        for form in FORMS:
            if report is not None:
                report(f"{dtype_name(dtype)}, {form}", number / len(dtypes))
            row = _measure(pages, form, repeat, plain)
            plain = plain or row.page_bytes
            rows.append(row)
    return rows


def _measure(pages: Sequence[torch.Tensor], form: PageForm, repeat: int, plain: float) -> StoredForm:
    layers, _, heads, tokens, dim = pages[0].shape
    shape = PageShape(layers, heads, tokens, dim, dtype_name(pages[0].dtype))
    store, seals, random = PageFormat("", form), Seals(""), np.random.default_rng(0)
    put: list[float] = []
    page_read: list[float] = []
    row_read: list[float] = []
    errors: list[float] = []
    sizes: list[int] = []
    spans: list[int] = []
    for number in range(repeat + 1):
        data = pages[number % len(pages)]
        raw = data.view(torch.uint8).numpy().reshape(-1).data
        page_id = number.to_bytes(32, "little")
        seal = seals.make(page_id, shape, raw)
        seconds, stored = _timed(store.pack, page_id, shape, seal, raw)
        put.append(seconds)
        seconds, (_, back) = _timed(store.unpack, page_id, stored)
        page_read.append(seconds)
        header = store.header(page_id, stored)
        places = random.integers(0, layers * 2 * heads * tokens, REQUEST_ROWS).tolist()
        read = [bytes(stored[first : last + 1]) for first, last in map(header.span, places)]
        seconds, _ = _timed(header.rows, places, read)
        row_read.append(seconds / REQUEST_ROWS)
        sizes.append(len(stored))
        spans += [len(one) for one in read]
        values = torch.frombuffer(bytearray(back), dtype=data.dtype).view(data.shape).float()
        variance = (data.float() - data.float().mean(3, keepdim=True)).square().sum()
        errors.append(float((values - data.float()).square().sum() / variance))
    mean = float(np.mean(sizes[1:]))
    return StoredForm(
        shape.dtype,
        form,
        mean,
        mean / (plain or mean),
        1e3 * median(put[1:]),
        1e3 * median(page_read[1:]),
        1e6 * median(row_read[1:]),
        float(np.mean(spans)),
        float(np.mean(errors)),
    )


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    begun = time.thread_time()
    made = work(*arguments)
    return time.thread_time() - begun, made
