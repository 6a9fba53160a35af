"""Decode steps whose decoder layers are compiled by torch.compile.

Layers stay transformers' own: what is compiled is their forward, once for all that are alike, with attention as an
operation that is not looked into. Only steps of one token a sequence over a QAQ cache go there; prompts and calls
with any other cache run as before.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from qaq_core.attention.base import LayerInput
from qaq_core.attention.interface import Attendable, check_outputs, use_qaq_attention
from qaq_core.base.errors import ConfigError, UnsupportedModelError

Report = Callable[[str, float], None]

_FORMS = 64
"""Kinds of layers, batches and numbers of threads that may be compiled of one class of layers in a process."""


class _Place(threading.local):
    """Which layer of which cache a compiled layer attends in.

    Attributes:
        cache: None once it has attended.
    """

    cache: Attendable | None = None
    layer: int = 0
    position_ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None


_place = _Place()


def compile_layers(model: Any, report: Report | None = None) -> None:
    """Compiles the model's decoder layers for decode steps, of one sequence and of several: up to a minute.

    What torch.compile has made before, it takes from its cache on disk.

    Raises:
        ConfigError: not on the CPU, or no C++ compiler.
        UnsupportedModelError: the model's layers cannot be compiled.
    """
    if model.device.type != "cpu":
        raise ConfigError("compiled layers have only been tried on the CPU; leave them as they are elsewhere")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(f"compiling layers needs a C++ compiler; there is no {compiler}")
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    config = model.config.get_text_config(decoder=True)
    if len(layers) != config.num_hidden_layers:
        raise UnsupportedModelError(f"{type(model).__name__} does not tell which modules are its layers")
    use_qaq_attention(model)
    for index, layer in enumerate(layers):
        layer.forward = _dispatched(layer.forward, index, config)
    # What is made is for a number of threads; workers decode with one fewer than they have.
    threads = torch.get_num_threads()
    kinds = [(count, batch) for count in {threads, max(1, threads - 1)} for batch in (1, 2)]
    try:
        for done, (count, batch) in enumerate(kinds):
            if report:
                report("compiling", done / len(kinds))
            torch.set_num_threads(count)
            _run(model, batch)
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _run(model: Any, batch: int) -> None:
    """A step of sequences without tokens."""
    ids = torch.zeros(batch, 1, dtype=torch.long)
    try:
        model(ids, position_ids=torch.zeros_like(ids), past_key_values=_Nothing(), use_cache=True)
    except torch._dynamo.exc.TorchDynamoException as error:
        message = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"{type(model).__name__} cannot be compiled: {message}") from error


def _dispatched(eager: Callable[..., Any], index: int, config: Any) -> Callable[..., Any]:
    """The forward of one layer: compiled where it can be."""
    compile_: Any = torch.compile  # its overloads do not know all of its parameters
    compiled = compile_(eager, fullgraph=True, recompile_limit=_FORMS)

    def forward(hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if args or hidden_states.shape[1] != 1 or not hasattr(past_key_values, "attend"):
            return eager(hidden_states, *args, past_key_values=past_key_values, **kwargs)
        check_outputs(kwargs)
        if index == 0:
            past_key_values.check_model(config)
        _place.cache, _place.layer, _place.position_ids = past_key_values, index, kwargs.get("position_ids")
        # Compiled for none: the cache looks at the mask, and attends without it.
        _place.mask = kwargs.get("attention_mask")
        out = compiled(hidden_states, **{**kwargs, "attention_mask": None, "qaq_step": True})
        if _place.cache is not None:
            raise UnsupportedModelError("this model's layers do not hand on what attention is to be told")
        return out

    return forward


class _Nothing(DynamicCache):
    """Attends to nothing: what layers are compiled with."""

    def attend(
        self, given: LayerInput, position_ids: torch.Tensor | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.zeros(given.query.shape)

    def check_model(self, config: Any) -> None:
        """It is nobody's."""


_library = torch.library.Library("qaq", "FRAGMENT")
_library.define("attend(Tensor query, Tensor keys, Tensor values, float scaling, int? sliding_window) -> Tensor")


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, sliding_window: int | None
) -> torch.Tensor:
    cache, _place.cache = _place.cache, None
    if cache is None:
        raise UnsupportedModelError("a layer attends more than once a step; it cannot be compiled")
    given = LayerInput(_place.layer, query, keys, values, scaling, sliding_window)
    out = cache.attend(given, _place.position_ids, _place.mask)
    return out.float().contiguous()


def _attend_shape(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, sliding_window: int | None
) -> torch.Tensor:
    return torch.empty(query.shape, dtype=torch.float32, device=query.device)


_library.impl("attend", _attend, "CPU")
torch.library.register_fake("qaq::attend", _attend_shape, lib=_library)
