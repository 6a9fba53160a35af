"""Where the time of decode steps over a QAQ cache goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qaq_core import QAQCache, SequenceCache
from qaq_core.attention import CpuAttention
from qaq_core.models import PackedLinear

PARTS = ("linear", "attention", "around attention", "begin", "packing and exceptions", "next token")
"""What is told apart. linear: linear layers, the output's included. attention: the kernel. around attention: from
transformers' call to the kernel and back. begin: what a step describes once for all layers. next token: the
likeliest one."""
REST = "rest"
"""Norms, activations, RoPE, masks, and Python from one to the next."""


@dataclass(frozen=True)
class PartRow:
    """A part of a step.

    Attributes:
        milliseconds: of the calling thread's CPU time, mean over steps. calls: in a step.
    """

    cache: str
    part: str
    milliseconds: float
    calls: float


class Stopwatch:
    """Adds up the calling thread's CPU time by part; a part within another is taken off that one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        self.begin(part)
        try:
            yield
        finally:
            self.end()

    def begin(self, part: str) -> None:
        self._charge()
        self._open.append(part)
        self.calls[part] += 1

    def end(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        now = time.thread_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def wrapped(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin(part)
            try:
                return call(*args, **kwargs)
            finally:
                self.end()

        return timed


@torch.inference_mode()
def step_parts(model: Any, name: str, cache: QAQCache, ids: torch.Tensor) -> list[PartRow]:
    """Decodes more tokens, int64 [batch, steps], and says where the time went.

    Linear layers inside of compiled ones cannot be told apart: there they are in the rest.
    """
    watch, steps, at = Stopwatch(), ids.shape[1], cache.get_seq_length()
    with _watched(model, cache, watch):
        for step in range(steps):
            with watch.timing(REST):
                positions = torch.full((len(ids), 1), at + step)
                output = model(ids[:, step : step + 1], position_ids=positions, past_key_values=cache, use_cache=True)
                with watch.timing("next token"):
                    output.logits[:, -1].argmax(-1).tolist()
    return [
        PartRow(name, part, watch.seconds[part] * 1000 / steps, watch.calls[part] / steps) for part in (*PARTS, REST)
    ]


@contextmanager
def _watched(model: Any, cache: QAQCache, watch: Stopwatch) -> Iterator[None]:
    """The model and the cache tell the stopwatch what they do."""
    attention = cache.method.attention
    kernel = (attention.library, "qaq_decode") if isinstance(attention, CpuAttention) else (attention, "batch")
    compiled = any("forward" in vars(module) for module in model.modules())
    linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, PackedLinear))]
    with ExitStack() as stack:
        for module in [model.get_output_embeddings()] if compiled else linear:
            stack.callback(module.register_forward_pre_hook(lambda *_: watch.begin("linear")).remove)
            stack.callback(module.register_forward_hook(lambda *_: watch.end()).remove)
        for owner, method, part in (
            (QAQCache, "attend", "around attention"),
            (QAQCache, "begin_step", "begin"),
            (SequenceCache, "commit", "packing and exceptions"),
            (*kernel, "attention"),
        ):
            call = getattr(owner, method)
            setattr(owner, method, watch.wrapped(part, call))
            stack.callback(setattr, owner, method, call)
        yield
