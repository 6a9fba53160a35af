"""The parts of a decode step with a QAQ cache, and their time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qaq_core import QAQCache, SequenceCache
from qaq_core.attention import CpuAttention
from qaq_core.kernels import load_library
from qaq_core.models import PackedLinear

PARTS = ("linear", "attention", "around attention", "begin", "packing and exceptions", "next token")
"""linear: linear layers, the output layer included. attention: the kernel. around attention: from transformers' call
to the kernel and back. begin: the description of the step for all layers. next token: its selection."""
REST = "rest"
"""Norms, activations, RoPE, masks, and Python between the parts."""


@dataclass(frozen=True)
class StepPart:
    """A part of a step.

    Attributes:
        milliseconds: CPU time of the calling thread per step, mean over steps. calls: calls per step.
    """

    cache: str
    part: str
    milliseconds: float
    calls: float


class Stopwatch:
    """Adds up the CPU time of the calling thread by part. Time of a nested part is not counted for the outer one."""

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


class Decoding(Protocol):
    """A model with a QAQ cache, see `decode.ModelDecoder`."""

    model: Any
    cache: Any
    lean: Any

    def decode(self, ids: torch.Tensor) -> torch.Tensor: ...


@torch.inference_mode()
def step_parts(one: Decoding, name: str, ids: torch.Tensor) -> list[StepPart]:
    """Decodes more tokens, int64 [batch, steps], and measures the parts of the steps.

    Linear layers inside compiled layers cannot be measured: their time counts as rest.
    """
    watch, steps = Stopwatch(), ids.shape[1]
    with _watched(one, watch):
        for step in range(steps):
            with watch.timing(REST):
                logits = one.decode(ids[:, step : step + 1])
                with watch.timing("next token"):
                    logits.argmax(-1).tolist()
    return [
        StepPart(name, part, watch.seconds[part] * 1000 / steps, watch.calls[part] / steps) for part in (*PARTS, REST)
    ]


@contextmanager
def _watched(one: Decoding, watch: Stopwatch) -> Iterator[None]:
    """Measures the model and the cache with the stopwatch."""
    model, attention = one.model, one.cache.method.attention
    kernel = (attention.library, "qaq_decode") if isinstance(attention, CpuAttention) else (attention, "batch")
    library = load_library()  # the decoder's products
    products = [] if library is None or one.lean is None else [(library, "qaq_multiply", "linear")]
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
            *products,
        ):
            call = getattr(owner, method)
            setattr(owner, method, watch.wrapped(part, call))
            stack.callback(setattr, owner, method, call)
        yield
