"""What the C++ library is given wrongly is refused, before anything is read: each call is made with one thing wrong
first, and then as it is.

Longer: QAQ_FUZZ=100000 pytest tests/core/kernels/test_checks.py, best under the sanitizers (`make sanitize`).
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterator
from ctypes import Structure, c_int32, c_int64, c_uint8, c_void_p
from random import Random
from typing import Any

import pytest
import torch

from qaq_core import QAQCache
from qaq_core.base.errors import KernelError
from qaq_core.kernels import library as library_module
from qaq_core.kernels import load_library
from qaq_core.kernels.library import checked
from qaq_core.kernels.structures import CellTables, Encode, Layer, Narrow, Repack, Span, StepError, TransformTables
from tests.core.tiny_models import calibration, tiny, token_ids

LOADED = load_library()
pytestmark = pytest.mark.skipif(LOADED is None, reason="the C++ library is not built")

CALLS = int(os.environ.get("QAQ_FUZZ", "3000"))
FUNCTIONS = (
    *("qaq_attend", "qaq_decode", "qaq_transform", "qaq_transform_at", "qaq_rms", "qaq_encode", "qaq_update_statistic"),
    *("qaq_weigh", "qaq_widths", "qaq_width_changes", "qaq_step_error", "qaq_count", "qaq_repack", "qaq_narrow"),
    "qaq_prompt",
)
LAYER_AT = {"qaq_attend": 0, "qaq_decode": 1, "qaq_prompt": 1}
"""The argument that describes a layer."""
# Arrays of indices and sizes, by structure: their type, and how many there are.
ARRAYS: dict[type[Structure], dict[str, tuple[Any, Any]]] = {
    TransformTables: {"kind": (c_int64, lambda one: one.layers)},
    CellTables: {"units": (c_int64, lambda one: one.dim)},
    Encode: {
        "begin": (c_int64, lambda one: _rows(one.rows)),
        "have": (c_uint8, lambda one: _rows(one.rows)),
        "want": (c_uint8, lambda one: _rows(one.rows)),
    },
    Repack: {
        "index": (c_int64, lambda one: one.moves),
        "offsets": (c_int64, lambda one: one.moves),
        "keep": (c_uint8, lambda one: one.moves),
        "held_rows": (c_int64, lambda one: 14),
        "room": (c_int64, lambda one: 14),
        "tags_before": (c_uint8, lambda one: one.before),
        "tags_after": (c_uint8, lambda one: one.after),
    },
    Narrow: {
        "held_rows": (c_int64, lambda one: 14),
        "room": (c_int64, lambda one: 14),
        "before": (c_uint8, lambda one: one.tokens),
        "after": (c_uint8, lambda one: one.tokens),
    },
}
# More of these cannot be known to be too many.
_SIZES = ("held_rows", "room")
# With less, other tags are read, and the library cannot know how many rows there are of each width.
_TRUSTED = ("tags_head_stride",)


def _rows(span: Span) -> int:
    return int(span.layers * span.heads * span.tokens)


class Tampering:
    """The library, each of whose functions is called with one thing wrong before it is called as it was."""

    def __init__(self, library: Any, random: Random) -> None:
        self._library, self._random = library, random
        self.calls: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        return _Function(self, function) if name in FUNCTIONS else function

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        name = function.__name__
        with self._wrong(name, list(arguments)) as given:
            self.calls[name] += 1
            self.refused[name] += function(*given) < 0
        return function(*arguments)

    def _wrong(self, name: str, arguments: list[Any]) -> Any:
        places = [place for place, one in enumerate(arguments) if not isinstance(one, ctypes.c_float)]
        place = self._random.choice(places)
        one = arguments[place]
        made = Changes()
        if hasattr(one, "_obj"):
            self._structure(one._obj, made)
        elif name in LAYER_AT and place == LAYER_AT[name] and self._random.random() < 0.9:
            self._structure(Layer.from_address(one.value), made)
        elif name == "qaq_step_error" and self._random.random() < 0.9:
            self._structure(StepError.from_address(one.value), made)
        elif name == "qaq_transform_at" and place in (3, 4, 5) and self._random.random() < 0.7:
            self._array(one.value, c_int64, arguments[1].value, made)
        elif isinstance(one, c_void_p):
            arguments[place] = None
        else:
            arguments[place] = type(one)(self._less(one.value))
        made.arguments = arguments
        return made

    def _structure(self, one: Structure, made: Changes) -> None:
        name, kind, *_ = self._random.choice(one._fields_)
        if isinstance(kind, type) and issubclass(kind, Structure):
            self._structure(getattr(one, name), made)
        elif name in (arrays := ARRAYS.get(type(one), {})) and getattr(one, name) and self._random.random() < 0.8:
            number, count = arrays[name]
            self._array(getattr(one, name), number, count(one), made, only_less=name in _SIZES)
        elif kind is c_void_p:
            made.set(one, name, None)
        elif kind in (c_int32, c_int64) and name not in _TRUSTED:
            made.set(one, name, self._less(getattr(one, name)))

    def _array(self, address: int, kind: Any, count: int, made: Changes, only_less: bool = False) -> None:
        if not count:
            return
        numbers, place = (kind * count).from_address(address), self._random.randrange(count)
        if kind is c_uint8:
            value = self._random.randrange(256)
        elif only_less:
            value = self._less(numbers[place])
        else:
            value = self._random.choice((-1, 2**62, -(2**63), numbers[place] + 1, numbers[0], numbers[count - 1]))
        made.set_at(numbers, place, value)

    def _less(self, value: int) -> int:
        """A number that is not above the right one, which only the caller knows."""
        return self._random.choice((-1, -(2**31), 0, value // 2, value - 1))


class Changes:
    """Fields and numbers that have other values while the context lasts."""

    def __init__(self) -> None:
        self.arguments: list[Any] = []
        self._undo: list[Any] = []

    def set(self, one: Structure, name: str, value: Any) -> None:
        before = getattr(one, name)
        self._undo.append(lambda: setattr(one, name, before))
        setattr(one, name, value)

    def set_at(self, numbers: Any, place: int, value: int) -> None:
        before = numbers[place]
        self._undo.append(lambda: numbers.__setitem__(place, before))
        numbers[place] = value

    def __enter__(self) -> list[Any]:
        return self.arguments

    def __exit__(self, *_: object) -> None:
        for undo in reversed(self._undo):
            undo()


class _Function:
    def __init__(self, tampering: Tampering, function: Any) -> None:
        self.__dict__.update(_tampering=tampering, _function=function)

    def __call__(self, *arguments: Any) -> Any:
        return self._tampering.call(self._function, arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._function, name, value)


@pytest.fixture
def tampering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tampering]:
    made = Tampering(LOADED, Random(5))
    monkeypatch.setattr(library_module, "_load", lambda: (made, None))
    load_library.cache_clear()
    yield made
    monkeypatch.undo()
    load_library.cache_clear()


@pytest.mark.slow
@pytest.mark.timeout(600 + CALLS // 50)
def test_what_is_wrong_is_refused(tampering: Tampering) -> None:
    seed = 0
    while tampering.calls.total() < CALLS:
        kind = ("llama-gqa", "llama-mqa-80", "qwen2")[seed % 3]
        model = tiny(kind)
        settings = {"calibration": calibration(kind), "target_bits": (2.0, 5.0)[seed % 2], "exceptions": "in-time"}
        ids = token_ids(70 + seed % 50, seed)
        try:
            with torch.no_grad():
                cache = QAQCache.for_model(model, **settings)
                model(ids, past_key_values=cache, use_cache=True)
                for token in token_ids(40, seed)[0]:
                    model(token.view(1, 1), past_key_values=cache, use_cache=True)
        except (RuntimeError, ValueError):
            pass  # what was changed with success was changed
        seed += 1
    assert tampering.refused.keys() >= {*FUNCTIONS} - {"qaq_attend", "qaq_transform_at", "qaq_narrow"}
    assert sum(tampering.refused.values()) > tampering.calls.total() // 5


def test_a_refusal_is_an_exception() -> None:
    assert LOADED is not None
    with pytest.raises(KernelError, match="qaq_rms cannot be called like this: a pointer that it needs is null"):
        checked(LOADED.qaq_rms, None, c_int32(16), c_int32(16), None, c_int64(0), c_int32(1))
    numbers = torch.zeros(16)
    span = Span(numbers.data_ptr(), 1, 1, -1, (c_int64 * 3)(0, 0, 16))
    out = c_void_p(numbers.data_ptr())
    with pytest.raises(KernelError, match="sizes do not fit"):
        checked(LOADED.qaq_rms, ctypes.byref(span), c_int32(16), c_int32(16), out, c_int64(1), c_int32(1))
