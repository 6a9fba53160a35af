"""A whole step of models with random weights: a dense cache in bfloat16 against QAQ's, with all that the host does."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from qaq_core.attention import PROMPT, CudaAttention
from qaq_core.cache import QAQCache, SequenceCache
from qaq_eval.speed.gpu_check.bench import Machine, Report, Table, millis, rate, ratio
from qaq_eval.speed.gpu_check.model import RandomModel, shapes, with_prompt

TOKENS, BATCHES, STEPS = 4096, (1, 16, 64), 16
"""Steps: two of them pack tokens, four review them."""
ROOM = 0.85


def step(machine: Machine, report: Report) -> Table:
    """All shapes and batches."""
    columns = ["model", "batch", "dense ms", "GiB", "QAQ ms", "mean ms", "GiB", "QAQ/dense", "tokens/s"]
    tokens, batches = (70, (1, 2)) if machine.emulated else (TOKENS, BATCHES)
    table = Table(f"A whole step after {tokens} tokens, random weights, bfloat16", columns)
    table.notes.append("QAQ ms: the median step, which neither packs nor reviews; mean ms and tokens/s: of all")
    table.notes.append("GiB are of keys and values")
    for shape in shapes(machine):
        if machine.left < 0:
            table.notes.append(f"out of time: {shape.name} was not run")
            continue
        report(f"step: {shape.name}, making weights and a prompt", None)
        model = RandomModel(machine, shape)
        first = with_prompt(model, tokens)
        for batch in batches:
            if machine.left < 0:
                table.notes.append(f"out of time: {shape.name}, batch {batch} was not run")
                break
            report(f"step: {shape.name}, batch {batch}", None)
            table.rows.append(_case(machine, model, first, batch, tokens))
        first.close()
        attention = model.method.attention
        assert isinstance(attention, CudaAttention)
        if others := set(attention.fallbacks) - {PROMPT}:
            table.failed.append(f"{shape.name}: the reference attended instead of the kernels: {', '.join(others)}")
    return table


@torch.no_grad()
def _case(machine: Machine, model: RandomModel, first: SequenceCache, batch: int, tokens: int) -> list[str]:
    _, kv_heads, dim = model.shape.heads
    size = 4 * model.shape.layers * batch * kv_heads * (tokens + STEPS + 1) * dim
    dense, shown = None, "does not fit"
    if _fits(machine, size):
        cache = _Dense(model, batch, tokens)
        dense = _median(_times(machine, _stepping(model, cache, batch, tokens, None)))
        shown = millis(dense)
        del cache
    sequences = [first.fork() for _ in range(batch)]
    cached = QAQCache(sequences)
    seconds = _times(machine, _stepping(model, cached, batch, tokens, cached))
    held = sum(one.nbytes for one in sequences)
    for one in sequences:
        one.close()
    plain, every = _median(seconds), None if machine.emulated else statistics.mean(seconds)
    numbers = [shown, f"{size / 2**30:.2f}", millis(plain), millis(every), f"{held / 2**30:.2f}"]
    return [model.shape.name, str(batch), *numbers, ratio(plain, dense), rate(batch, every, 1)]


def _stepping(model: RandomModel, cache: Any, batch: int, tokens: int, told: QAQCache | None) -> Callable[[], None]:
    """Makes a step at each call: ids from the host, logits to the host."""
    done = 0

    def one() -> None:
        nonlocal done
        places = torch.full((batch, 1), tokens + done)
        done += 1
        device = model.method.device
        given = torch.stack([torch.full_like(places, 5), places]).to(device, non_blocking=True)
        own: dict[str, Any] = {} if told is None else {"qaq_cache": told}
        if told is not None:
            told.place(places)
        own |= {"past_key_values": cache, "use_cache": True}
        logits = model.module(input_ids=given[0], position_ids=given[1], **own).logits
        if not bool(torch.isfinite(logits[:, -1]).all().cpu()):
            raise RuntimeError("a step's logits are not numbers")

    return one


def _times(machine: Machine, one: Callable[[], None]) -> list[float]:
    """Seconds of each step but the first."""
    one()
    found = [machine.stepped(one, 1) for _ in range(2 if machine.emulated else STEPS)]
    return [seconds for seconds in found if seconds is not None]


def _median(seconds: list[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


def _fits(machine: Machine, size: int) -> bool:
    return machine.device.type != "cuda" or size < ROOM * torch.cuda.mem_get_info(machine.device)[0]


class _Dense(DynamicCache):
    """Random keys and values with room for more, which are written where they stay: nothing is copied in a step."""

    def __init__(self, model: RandomModel, batch: int, tokens: int) -> None:
        super().__init__()
        _, heads, dim = model.shape.heads
        dims = (model.shape.layers, 2, batch, heads, tokens + STEPS + 2, dim)
        self._held = torch.empty(dims, dtype=torch.bfloat16, device=model.method.device).normal_()
        self._tokens, self._last = tokens, model.shape.layers - 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stop = self._tokens + 1
        keys, values = self._held[layer_idx]
        keys[:, :, self._tokens : stop], values[:, :, self._tokens : stop] = key_states, value_states
        self._tokens += layer_idx == self._last
        return keys[:, :, :stop], values[:, :, :stop]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._tokens + query_length, 0
